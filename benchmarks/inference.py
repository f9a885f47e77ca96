"""What the expert cache, its predictors and the token scheduler bring: engines under one budget side by side, on a trained model.

    raymoe bench inference [--arms a,b] [--budgets 5,10,25,50,100] [--batches 1,4,16,32] [--rounds 3] [--dtype bfloat16] [--json F]

Every engine gets the same greedy requests, all at once, the engines in turns; the first round fills their caches and is not
timed. Experts come from the checkpoint's files past the page cache. The bound beside a row is what the fetches of Belady's
oracle on the row's own demands would take at the rate measured for the files, or the all-resident engine's time if that is more.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from raymoe.benchmarks.inference_arms import ARMS, options_of
from raymoe.benchmarks.inference_model import prompts, trained_model
from raymoe.benchmarks.inference_rivals import SYSTEMS, measure
from raymoe.benchmarks.near_ties import NearTies
from raymoe.inference import Delta, InferenceEngine, SamplingParams
from raymoe.inference.replay import belady
from raymoe.inference.scheduler import GroupingOptions
from raymoe.models import load_without_experts
from raymoe.telemetry import write_json

Row = dict[str, Any]
Prompts = list[list[int]]
_RIVAL_TOKENS = 12
_CROWDED_BATCH, _CROWD = 8, 4
_COLUMNS = {
    "arm": ("arm", "", 1), "tokens_per_s": ("tok/s", ".0f", 1), "spread": ("min-max", "", 1),
    "share_of_resident": ("resident", ".0%", 1), "bound_share": ("bound", ".0%", 1), "ttft_ms": ("first ms", ".0f", 1),
    "itl_p50_ms": ("p50 ms", ".1f", 1), "itl_p95_ms": ("p95 ms", ".1f", 1), "bytes_per_token": ("MB/tok", ".2f", 1e6),
    "over_belady": ("Belady", ".2f", 1), "wasted_bytes": ("wasted MB", ".0f", 1e6), "hit_rate": ("hits", ".1%", 1),
    "experts_per_step": ("experts", ".0f", 1), "identical": ("same", "", 1), "near_ties": ("ties", "", 1),
    "other_differences": ("wrong", "", 1),
}  # fmt: skip
"""Of the printed table: title, format, unit."""


@dataclass(frozen=True)
class _Bench:
    """What all cells have in common."""

    model: Path
    rounds: int
    tokens: int
    dtype: str
    ties: NearTies


@dataclass
class Round:
    """What one system did with one set of requests."""

    wall_s: float
    tokens: list[list[int]]
    ttft_s: list[float]
    """Of each request."""
    itl_s: list[float]
    """Between the tokens of a request, for all of them."""

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.wall_s


@dataclass
class _Running:
    """An arm's engine, what it did, and what its layers wanted."""

    engine: InferenceEngine
    rounds: list[Round] = field(default_factory=list)
    visits: list[tuple[int, list[int]]] = field(default_factory=list)

    def watch(self) -> None:
        """From now on `visits` is written."""
        acquire = self.engine.cache.acquire

        def watched(layer: int, experts: Sequence[int]) -> Any:
            self.visits.append((layer, list(experts)))
            return acquire(layer, experts)

        self.engine.cache.acquire = watched

    def trace(self) -> list[list[list[int]]]:
        steps: list[list[list[int]]] = []
        for layer, experts in self.visits:
            if layer == 0:
                steps.append([])
            steps[-1].append(experts)
        return steps


def run(
    arms: Sequence[str],
    budgets: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    tokens: int,
    rivals: Sequence[int],
    crowded: Sequence[int],
    dtype: str,
    folder: Path | None,
    console: Console,
    command: str,
    json: Path | None = None,
) -> list[Row]:
    """Measures, prints and writes.

    Args:
        arms: names of `raymoe.benchmarks.inference_arms.ARMS`; "resident" is always there.
        budgets: percent of all experts.
        rounds: timed ones.
        tokens: generated for each request.
        crowded: budgets, in percent, under which four times as many requests wait as a step holds, with the token scheduler and
            in order of arrival.
        rivals: budgets, in percent, under which other systems run beside raymoe, one request at a time.
        dtype: of all raymoe's engines; tokens that differ from the all-resident engine's are judged, see `near_ties`.
        folder: where the trained model is kept, or made; None: made anew.

    Raises:
        ValueError: an unknown arm.
    """
    names = list(dict.fromkeys(["resident", *arms]))
    for name in names:
        if name not in ARMS:
            raise ValueError(f"--arms: unknown arm {name!r}; known are {', '.join(ARMS)}")
    torch.set_num_threads(2)
    rows: list[Row] = []
    with ExitStack() as stack:
        home = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = trained_model(home, console, command)
        bench = _Bench(model, rounds, tokens, dtype, NearTies(model, getattr(torch, dtype)))
        asked = prompts(home, max(batches))
        for budget in budgets:
            for batch in batches:
                rows += _cell(bench, names, budget, batch, asked[:batch])
                console.print(_table([row for row in rows if row["budget"] == budget and row["batch"] == batch]))
        for budget in crowded:
            rows += _crowded(bench, budget, prompts(home, _CROWD * _CROWDED_BATCH), console)
        for budget in rivals:
            rows += _rivals(model, budget, asked, rounds, console)
    if json is not None:
        write_json(json, command, rows)
    return rows


def _crowded(bench: _Bench, budget: int, asked: Prompts, console: Console) -> list[Row]:
    """Two rows: batches by routes, and in order of arrival; ratios are of rounds that follow each other."""
    plain = GroupingOptions(max_active=_CROWDED_BATCH)
    with ExitStack() as stack:
        running: dict[str, _Running] = {}
        for name, grouping in (("in order", plain), ("by routes", GroupingOptions())):
            options = options_of("full", budget, len(asked), bench.dtype)
            options |= {"max_requests": _CROWDED_BATCH, "grouping": grouping}
            running[name] = _Running(stack.enter_context(InferenceEngine(bench.model, **options)))
            running[name].watch()
        for _ in range(bench.rounds + 1):
            for each in running.values():
                each.rounds.append(generate(each.engine, asked, bench.tokens))
        reference = running["in order"]
        rows = [_row(bench, name, budget, _CROWDED_BATCH, each, reference, asked) for name, each in running.items()]
    table = Table("batches", "tok/s", "min-max", "over in order", "MB/tok", "experts a step", "grouping", "same",
                  title=f"{len(asked)} requests, {_CROWDED_BATCH} a step, {budget} % of experts")  # fmt: skip
    for row in rows:
        table.add_row(row["arm"], f"{row['tokens_per_s']:.0f}", row["spread"], f"{row['share_of_resident']:.2f}",
                      f"{row['bytes_per_token'] / 1e6:.2f}", f"{row['experts_per_step']:.0f}",
                      f"{row['grouping']['state']}: {row['grouping']['reason']}", str(row["identical"]))  # fmt: skip
    console.print(table)
    return [row | {"arm": f"crowded {row['arm']}", "over_in_order": row["share_of_resident"]} for row in rows]


def _rivals(model: Path, budget: int, asked: Prompts, rounds: int, console: Console) -> list[Row]:
    """A row a system, in turns; ratios are of the rounds' own rates."""
    layers = load_without_experts(model, torch.float32)[1].layers
    budget_bytes = sum(layer.layout.numel * layer.num_experts * 4 for layer in layers) * budget // 100
    rates: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    told: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name in SYSTEMS:
            told[name] = found = measure(name, model, [asked[number % len(asked)]], _RIVAL_TOKENS, budget_bytes)
            rates[name] += found["tokens_per_s"]
    rows: list[Row] = [
        {
            "arm": name,
            "budget": budget,
            "batch": 1,
            "tokens_per_s": statistics.median(rates[name]),
            "spread": _spread(rates[name]),
            "raymoe_over": statistics.median(
                ours / theirs for ours, theirs in zip(rates["raymoe"], rates[name], strict=True)
            ),
            "bytes_per_token": told[name]["bytes_per_token"],
            "identical": told[name]["tokens"] == told["raymoe"]["tokens"],
            "limited_by": told[name]["limited_by"],
        }
        for name in SYSTEMS
    ]
    table = Table(
        "system", "tok/s", "min-max", "raymoe over it", "MB/tok", "same", title=f"one request, {budget} % of experts"
    )
    for row in rows:
        table.add_row(row["arm"], f"{row['tokens_per_s']:.2f}", row["spread"], f"{row['raymoe_over']:.1f}x",
                      f"{row['bytes_per_token'] / 1e6:.1f}", str(row["identical"]))  # fmt: skip
    console.print(table)
    return rows


def _cell(bench: _Bench, names: Sequence[str], budget: int, batch: int, asked: Prompts) -> list[Row]:
    with ExitStack() as stack:
        running: dict[str, _Running] = {}
        for name in names:
            engine = stack.enter_context(InferenceEngine(bench.model, **options_of(name, budget, batch, bench.dtype)))
            running[name] = _Running(engine)
            running[name].watch()
        for _ in range(bench.rounds + 1):
            for each in running.values():
                each.rounds.append(generate(each.engine, asked, bench.tokens))
        resident = running["resident"]
        return [_row(bench, name, budget, batch, each, resident, asked) for name, each in running.items()]


def generate(engine: InferenceEngine, asked: Prompts, tokens: int) -> Round:
    """Submits all prompts at once, greedy, and waits until each has its `tokens`."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, stop_token_ids=())
    answers: list[list[int]] = [[] for _ in asked]
    times: list[list[float]] = [[] for _ in asked]
    done = threading.Semaphore(0)

    def submit(row: int) -> None:
        def take(delta: Delta) -> None:
            now_s = time.perf_counter()
            answers[row] += delta.tokens
            times[row] += [now_s] * len(delta.tokens)
            if delta.finish_reason is not None:
                assert delta.finish_reason == "length", delta
                done.release()

        engine.submit(asked[row], params, take)

    began_s = time.perf_counter()
    for row in range(len(asked)):
        submit(row)
    for _ in asked:
        done.acquire()
    wall_s = time.perf_counter() - began_s
    gaps = [after - before for each in times for before, after in itertools.pairwise(each)]
    return Round(wall_s, answers, [each[0] - began_s for each in times], gaps)


def _row(bench: _Bench, name: str, budget: int, batch: int, this: _Running, resident: _Running, asked: Prompts) -> Row:
    timed, reference = this.rounds[1:], resident.rounds[1:]
    rate = statistics.median(each.tokens_per_s for each in timed)
    shares = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in zip(timed, reference, strict=True)]
    total, stats = this.engine.cache.totals(), this.engine.stats()
    num_tokens = sum(len(tokens) for each in this.rounds for tokens in each.tokens)
    trace = this.trace()
    oracle = belady(trace, this.engine.cache.num_slots)
    file_rate = stats["tiers"][-1]["rate"]
    fetch_s = file_rate["latency_s"] + this.engine.cache.slot_bytes / file_rate["bytes_per_s"]
    resident_rate = statistics.median(each.tokens_per_s for each in reference)
    bound = min(resident_rate, num_tokens / max(oracle.misses * fetch_s, 1e-9))
    gaps = sorted(gap for each in timed for gap in each.itl_s)
    found = [bench.ties.count(asked, ours.tokens, resident.rounds[0].tokens) for ours in this.rounds]
    return {
        "arm": name,
        "budget": budget,
        "batch": batch,
        "tokens_per_s": rate,
        "spread": _spread([each.tokens_per_s for each in timed]),
        "share_of_resident": statistics.median(shares),
        "bound": bound,
        "bound_share": rate / bound,
        "ttft_ms": 1e3 * statistics.median(value for each in timed for value in each.ttft_s),
        "itl_p50_ms": 1e3 * gaps[len(gaps) // 2],
        "itl_p95_ms": 1e3 * gaps[int(0.95 * len(gaps))],
        "bytes_per_token": total.fetched_bytes / num_tokens,
        "over_belady": total.fetched_bytes / (oracle.misses * this.engine.cache.slot_bytes),
        "wasted_bytes": total.wasted_bytes,
        "hit_rate": total.hit_rate,
        "experts_per_step": sum(len(experts) for _, experts in this.visits) / len(trace),
        "identical": not any(each.near_ties or each.others for each in found),
        "near_ties": sum(each.near_ties for each in found),
        "other_differences": sum(each.others for each in found),
        "stall_ms_per_token": 1e3 * total.stall_s / num_tokens,
        "file_bytes_per_s": file_rate["bytes_per_s"],
        "file_latency_us": 1e6 * file_rate["latency_s"],
        "io": stats["tier_facts"]["file"]["mode"],
        "prediction": stats["prediction"],
        "grouping": stats["grouping"],
    }


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g}-{max(values):.3g}"


def _table(rows: Sequence[Row]) -> Table:
    table = Table(
        *(title for title, _, _ in _COLUMNS.values()), title="budget {budget} %, batch {batch}".format(**rows[0])
    )
    for row in rows:
        cells = [
            format(row[name] / unit, style) if style else str(row[name]) for name, (_, style, unit) in _COLUMNS.items()
        ]
        table.add_row(*cells)
    return table

"""What the expert cache, its predictors and the token scheduler bring: engines under one budget side by side, on a trained model.

    raymoe bench inference [--arms a,b] [--budgets 5,10,25,50,100] [--batches 1,4,16,32] [--rounds 3] [--json F]

Every engine gets the same greedy requests, all at once, the engines in turns; the first round fills their caches and is not
timed. Experts come from the checkpoint's files past the page cache. The bound beside a row is what the fetches of Belady's
oracle on the row's own demands would take at the rate measured for the files, or the all-resident engine's time if that is more.
"""

from __future__ import annotations

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
from raymoe.inference import Delta, InferenceEngine, SamplingParams
from raymoe.inference.replay import belady
from raymoe.telemetry import write_json

Row = dict[str, Any]
_COLUMNS = {
    "arm": "", "budget": "", "batch": "d", "tokens_per_s": ".0f", "spread": "", "share_of_resident": ".1%", "bound": ".0f",
    "bound_share": ".1%", "ttft_ms": ".0f", "itl_p50_ms": ".1f", "itl_p95_ms": ".1f", "bytes_per_token": ".3g",
    "over_belady": ".2f", "wasted_bytes": ".3g", "hit_rate": ".1%", "experts_per_step": ".1f", "identical": "",
}  # fmt: skip


@dataclass
class _Round:
    wall_s: float
    tokens: list[list[int]]
    ttft_s: list[float]
    itl_s: list[float]

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.wall_s


@dataclass
class _Running:
    """An arm's engine, what it did, and what its layers wanted."""

    engine: InferenceEngine
    rounds: list[_Round] = field(default_factory=list)
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
        asked = prompts(home, max(batches))
        for budget in budgets:
            for batch in batches:
                rows += _cell(model, names, budget, batch, asked[:batch], rounds, tokens)
                console.print(_table([row for row in rows if row["budget"] == budget and row["batch"] == batch]))
    if json is not None:
        write_json(json, command, rows)
    return rows


def _cell(
    model: Path, names: Sequence[str], budget: int, batch: int, asked: list[list[int]], rounds: int, tokens: int
) -> list[Row]:
    with ExitStack() as stack:
        running: dict[str, _Running] = {}
        for name in names:
            engine = stack.enter_context(InferenceEngine(model, **options_of(name, budget, batch)))
            running[name] = _Running(engine)
            running[name].watch()
        for _ in range(rounds + 1):
            for each in running.values():
                each.rounds.append(_generate(each.engine, asked, tokens))
        resident = running["resident"]
        return [_row(name, budget, batch, each, resident) for name, each in running.items()]


def _generate(engine: InferenceEngine, asked: list[list[int]], tokens: int) -> _Round:
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
    gaps = [after - before for each in times for before, after in zip(each, each[1:], strict=False)]
    return _Round(wall_s, answers, [each[0] - began_s for each in times], gaps)


def _row(name: str, budget: int, batch: int, this: _Running, resident: _Running) -> Row:
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
        "identical": all(ours.tokens == resident.rounds[0].tokens for ours in this.rounds),
        "stall_ms_per_token": 1e3 * total.stall_s / num_tokens,
        "file_bytes_per_s": file_rate["bytes_per_s"],
        "file_latency_us": 1e6 * file_rate["latency_s"],
        "io": stats["tier_facts"]["file"]["mode"],
        "prediction": stats["prediction"],
        "grouping": stats["grouping"],
    }


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.0f}-{max(values):.0f}"


def _table(rows: Sequence[Row]) -> Table:
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*(format(row[name], style) if style else str(row[name]) for name, style in _COLUMNS.items()))
    return table

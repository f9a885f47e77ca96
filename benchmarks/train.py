"""What placement brings in real training: policies of raymoe and other systems on one workload, in turns, on this machine.

    raymoe bench train [--workers 2] [--policies ep,fssdp,...] [--loads balanced,hot,smartmoe] [--rivals fsdp2,...]

raymoe's policies take turns on the same workers, a turn being two steps after those in which the policy is applied; other systems
keep processes of their own, asleep while the others compute. The limit beside a speed-up is what perfectly even computation would
bring: (A + W M) / (A + M) on W workers if one of them owns all that is asked for, A and M being a balanced step's time outside the
experts and in them; for other loads the busiest owner's share takes the place of W.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from raymoe.actors import StepSummary, ray_session
from raymoe.benchmarks.train_raymoe import APPLYING_STEPS, MEASURING_STEPS, RaymoeGroup
from raymoe.benchmarks.train_rivals import RivalError, RivalGroup, rival
from raymoe.benchmarks.train_workload import WORKLOAD, TrainWorkload
from raymoe.telemetry import write_json

Row = dict[str, Any]
POLICIES = ("ep", "fssdp", "fssdp-rm", "fastermoe")
_TURN = 2
_COLUMNS = (
    "policy", "load", "workers", "step_ms", "spread", "tokens_per_s", "speedup_over_ep", "limit_share", "imbalance",
    "bytes", "exposed_ms", "plan_ms", "peak_state_bytes",
)  # fmt: skip


def run(
    workers: int,
    policies: Sequence[str],
    loads: Sequence[str],
    rivals: Sequence[str],
    steps: int,
    console: Console,
    command: str,
    json: Path | None = None,
    given: TrainWorkload = WORKLOAD,
) -> list[Row]:
    """Measures, prints and writes.

    Args:
        policies: names of placement policies, `name:dispatch` for another dispatch than the policy's own.
        steps: timed steps of each system under each load, an even number.

    Raises:
        ValueError: an unknown policy, load or rival, or a batch that does not split over the workers.
    """
    for load in loads:
        given.counts(load, 0, workers)
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(ray_session(min_cpus=workers, own=True, dashboard=False))
        turns = -(-steps // _TURN)
        block = MEASURING_STEPS + turns * len(policies) * (APPLYING_STEPS + _TURN)
        group = stack.enter_context(RaymoeGroup(workers, folder, tuple(loads), block, given))
        theirs, failed = _rivals(stack, rivals, workers, given)
        rows += failed
        balanced: StepSummary | None = None
        for load in loads:
            timed: dict[str, list[StepSummary]] = {name: [] for name in policies}
            seconds: dict[str, list[float]] = {each.name: [] for each in theirs}
            held: dict[str, int] = {}
            group.steps(MEASURING_STEPS)
            for turn in range(turns):
                for name in policies:
                    group.follow(name)
                    timed[name] += group.steps(_TURN)
                    held[name] = max(sum(parts.values()) for parts in group.state_bytes())
                for each in theirs:
                    seconds[each.name] += each.steps(load, _TURN)
                console.print(f"{load}: turn {turn + 1} of {turns}", highlight=False)
            if load == "balanced" and "ep" in timed:
                balanced = sorted(timed["ep"], key=lambda step: step.step_s)[len(timed["ep"]) // 2]
            rows += _rows_of(workers, timed, held, load, given, balanced)
            rows += [_rival_row(each, load, seconds[each.name], given) for each in theirs]
    console.print(_table(rows))
    if balanced is not None:
        share = balanced.experts_s / balanced.step_s
        console.print(f"experts are {share:.0%} of a balanced step of expert parallelism", highlight=False)
    if json is not None:
        write_json(json, command, rows, meta={"workload": repr(given)})
    return rows


def _rivals(
    stack: ExitStack, names: Sequence[str], workers: int, given: TrainWorkload
) -> tuple[list[RivalGroup], list[Row]]:
    groups, failed = [], []
    for name in names:
        try:
            group = stack.enter_context(rival(name, workers, workload=given))
            group.steps("balanced", 0)
            groups.append(group)
        except RivalError as error:
            failed.append({"policy": name, "workers": workers, "note": str(error).strip().rpartition("\n")[2]})
    return groups, failed


def _rows_of(
    workers: int,
    timed: dict[str, list[StepSummary]],
    held: dict[str, int],
    load: str,
    given: TrainWorkload,
    balanced: StepSummary | None,
) -> list[Row]:
    ep_s = _median(timed.get("ep", []), lambda step: step.step_s)
    rows = []
    for name, steps in timed.items():
        step_s = _median(steps, lambda step: step.step_s)
        assert step_s is not None, "there are timed steps"
        row: Row = {
            "policy": name,
            "load": load,
            "workers": workers,
            "step_ms": 1e3 * step_s,
            "spread": _quartiles([1e3 * step.step_s for step in steps]),
            "tokens_per_s": given.tokens / step_s,
            "imbalance": _median(steps, lambda step: step.worker_imbalance),
            "bytes": _median(steps, lambda step: sum(step.moved_bytes.values())),
            "exposed_ms": _median(steps, lambda step: 1e3 * step.exposed_s),
            "plan_ms": _median(steps, lambda step: 1e3 * step.planning_s),
            "peak_state_bytes": held[name],
        }
        if ep_s is not None:
            row["speedup_over_ep"] = ep_s / step_s
        if ep_s is not None and balanced is not None:
            outside_s = balanced.step_s - balanced.experts_s
            owners = _median(steps, lambda step: step.owner_imbalance)
            assert owners is not None, "there are timed steps"
            row["limit"] = (outside_s + owners * balanced.experts_s) / balanced.step_s
            row["limit_share"] = row["speedup_over_ep"] / row["limit"]
        rows.append(row)
    return rows


def _rival_row(group: RivalGroup, load: str, seconds: list[float], given: TrainWorkload) -> Row:
    return {
        "policy": group.name,
        "load": load,
        "workers": group.workers,
        "step_ms": 1e3 * statistics.median(seconds),
        "spread": _quartiles([1e3 * each for each in seconds]),
        "tokens_per_s": given.tokens / statistics.median(seconds),
        "note": group.rival.note,
        "versions": group.versions,
    }


def _median(steps: Sequence[StepSummary], value: Callable[[StepSummary], float]) -> float | None:
    return statistics.median(map(value, steps)) if steps else None


def _quartiles(values: Sequence[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _table(rows: Sequence[Row]) -> Table:
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*(_cell(column, row.get(column)) for column in _COLUMNS))
    return table


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "spread":
        return "{:.0f}-{:.0f}".format(*value)
    if column in ("bytes", "peak_state_bytes"):
        return f"{value / 1e6:.1f} MB"
    if column in ("step_ms", "tokens_per_s"):
        return f"{value:.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

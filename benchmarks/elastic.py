"""What a death, a join and a leave cost: the demo's model in actors, killed at random, beside a run in which nothing happens.

    raymoe bench elastic [--workers 3] [--kills 20] [--snapshots 4] [--dense sharded] [--dtype float64] [--seed 0] [--json FILE]

Times are wall-clock seconds from the SIGKILL: until the controller knows (`detect_s`), until the first step is done again
(`first_step_s`), until the first step is done that had not been done before (`recover_s`). After each death a new worker joins;
`stopped_s` is the pause that a join or a leave makes between two steps, beyond the median step.

Another number of workers adds the same gradients in another order, and routing amplifies the last bit: tokens change experts, and
after some ten steps at the demo's rate the losses of two undisturbed runs differ in the third digit. `chaos` is that difference,
between the undisturbed run and one with a worker fewer. In float64 the last bit stays small enough to compare the whole run.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from raymoe.actors import RunEvent, StepSummary, WorkerGroup, ray_session
from raymoe.commands.demo import demo_config
from raymoe.config import TrainConfig, parse_config
from raymoe.telemetry import write_json
from raymoe.training.job import TrainJob, prepare_job, prepare_text

_SETTLING_STEPS = 12
_RATE_STEPS = 24
_PATIENCE_S = 120.0
_TOLERANCE = 1e-5
_COMPARED_STEPS = 120
"""In float32, where later ones have nothing more in common."""
_RATE_SEQUENCES = 40
"""A step, so that a worker has at least 20 of them."""


@dataclass
class _Follower:
    """Reads a run's steps as they come, in the time that somebody waits for something."""

    group: WorkerGroup
    steps: list[StepSummary]
    stream: Iterator[StepSummary]

    @staticmethod
    def of(group: WorkerGroup) -> _Follower:
        return _Follower(group, [], group.train())

    def read(self, number: int) -> None:
        """The next steps."""
        for _ in range(number):
            self.steps.append(next(self.stream))

    def event(self, kind: str, after: int) -> RunEvent:
        """The first event of a kind from number `after` on; steps are read until it is there."""
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            for event in self.group.events:
                if event.kind == kind and event.number >= after:
                    return event
            self.read(1)
        raise RuntimeError(f"no {kind!r} came within {_PATIENCE_S:g} s")


def run(
    workers: int,
    kills: int,
    snapshots: int | str,
    dense: str,
    dtype: str,
    seed: int,
    console: Console,
    command: str,
    json: Path | None,
) -> list[dict]:
    """Runs all of it and prints it; returns the rows.

    Raises:
        RuntimeError: the run did not recover, or its losses are not those of the undisturbed run: in float64 within 1e-5 up to the
            step from which on two undisturbed runs differ by a tenth of that themselves, in float32, where rounding is
            amplified from the first change of the number of workers on, never 10 times as far from it as two undisturbed runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = demo_config("stdlib", 100_000, Path(folder) / "run")
        text = prepare_text(config, Path(folder) / "run")

        def job(name: str, **changes: object) -> TrainJob:
            asked = {
                "workers": {"min": 1, "max": workers},
                "snapshots": {"every": snapshots},
                "dense": dense,
                "worker_cpus": 0.5,
            }
            plain = config.model_dump(mode="json")
            plain["model"]["dtype"] = dtype
            tree = plain | asked | changes | {"output": str(Path(folder) / "run")}
            return prepare_job(parse_config(TrainConfig, tree), Path(folder) / "run", text)

        with ray_session(workers + 1, own=True, dashboard=False):
            rows, steps, snapshot = _kills(job("kills"), kills, seed, console)
            rows += _leaves(job("leaves"), console)
            rows.append(_rate_share(job("rate", workers={"min": 1, "max": 2}, batch=_RATE_SEQUENCES, worker_cpus=1)))
            compared = len(steps) if dtype == "float64" else min(len(steps), _COMPARED_STEPS)
            losses = _undisturbed(job("undisturbed", workers=workers), compared)
            fewer = _undisturbed(job("fewer", workers=workers - 1), compared)
    equality = _compare(steps[:compared], losses, fewer)
    _print(console, rows, equality, compared, snapshot)
    if json is not None:
        write_json(
            json,
            command,
            rows,
            meta={"dense": dense, "dtype": dtype, "steps": len(steps), "compared": compared} | equality | snapshot,
        )
    is_exact = dtype == "float64"
    found = equality["worst_before_chaos" if is_exact else "worst_difference"]
    allowed = _TOLERANCE if is_exact else 10 * equality["worst_chaos"]
    if found > allowed:
        raise RuntimeError(f"losses differ from the undisturbed run's by up to {found:.1e}, more than {allowed:.1e}")
    return rows


def _kills(job: TrainJob, kills: int, seed: int, console: Console) -> tuple[list[dict], list[StepSummary], dict]:
    rng = random.Random(seed)
    rows = []
    with WorkerGroup(job) as group:
        group.start()
        follower = _Follower.of(group)
        follower.read(_SETTLING_STEPS)
        for number in range(kills):
            follower.read(rng.randrange(3, 12))
            known = len(group.events)
            states = group.states()
            victim = rng.choice(states)
            time.sleep(rng.random() * statistics.median(step.step_s for step in follower.steps[-8:]))
            killed_s = time.time()
            os.kill(victim.pid, signal.SIGKILL)
            death = follower.event("death", known)
            rollback = follower.event("rollback", known)
            resumed = follower.event("resumed", rollback.number)
            last = rollback.step + rollback.values["repeats"] - 1
            while follower.steps[-1].step <= last:
                follower.read(1)
            beyond = next(step for step in follower.steps if step.step == last + 1)
            rows.append(
                {
                    "event": "death",
                    "at_step": last,
                    "workers": len(states),
                    "detect_s": death.time_s - killed_s,
                    "restore_s": rollback.values["restore_s"],
                    "first_step_s": resumed.time_s - killed_s,
                    "recover_s": beyond.at_s - killed_s,
                    "stopped_s": None,
                    "repeated_steps": rollback.values["repeats"],
                    "lost_steps": _missing(follower.steps),
                    "rate_share": None,
                }
            )
            console.print(
                f"kill {number + 1} of {kills}: {rows[-1]['recover_s']:.2f} s, {rows[-1]['repeated_steps']} repeated",
                highlight=False,
            )
            joined = follower.event("join", rollback.number)
            follower.read(4)
            rows.append(_pause("join", joined, follower.steps))
        last_states = group.states()
        publication = group.publication()
        assert publication is not None
        snapshot = {
            "snapshot_every": publication.snapshot_every,
            "state_bytes": sum(last_states[0].state_bytes.values()),
            "snapshot_bytes": sum(last_states[0].snapshot_bytes.values()),
        }
        return rows, follower.steps, snapshot


def _leaves(job: TrainJob, console: Console) -> list[dict]:
    rows = []
    with WorkerGroup(job) as group:
        group.start()
        follower = _Follower.of(group)
        follower.read(_SETTLING_STEPS)
        for wanted in range(job.config.workers.max - 1, 0, -1):
            known = len(group.events)
            group.scale(wanted)
            left = follower.event("leave", known)
            follower.read(6)
            rows.append(_pause("leave", left, follower.steps))
            console.print(f"leave: stopped {rows[-1]['stopped_s']:.2f} s", highlight=False)
    return rows


def _pause(kind: str, event: RunEvent, steps: list[StepSummary]) -> dict:
    """A row: how much longer than others the step took that came after the event."""
    index = next(i for i, step in enumerate(steps) if step.at_s > event.time_s)
    typical = statistics.median(step.step_s for step in steps[index - 6 : index + 4])
    return {
        "event": kind,
        "at_step": event.step,
        "workers": steps[index].workers,
        "detect_s": None,
        "restore_s": None,
        "first_step_s": None,
        "recover_s": None,
        "stopped_s": max(0.0, steps[index].at_s - steps[index - 1].at_s - typical),
        "repeated_steps": 0,
        "lost_steps": _missing(steps),
        "rate_share": None,
    }


def _rate_share(job: TrainJob) -> dict:
    """A row: throughput of one of two workers over half of both's."""
    with WorkerGroup(job) as group:
        group.start()
        follower = _Follower.of(group)
        follower.read(_SETTLING_STEPS + _RATE_STEPS)
        both = statistics.median(step.tokens_per_s for step in follower.steps[-_RATE_STEPS:])
        known = len(group.events)
        group.scale(1)
        left = follower.event("leave", known)
        follower.read(_SETTLING_STEPS + _RATE_STEPS)
        alone = statistics.median(step.tokens_per_s for step in follower.steps[-_RATE_STEPS:])
    return _pause("leave", left, follower.steps) | {"event": "1 of 2 workers", "rate_share": alone / (both / 2)}


def _compare(steps: list[StepSummary], losses: dict[int, float], fewer: dict[int, float]) -> dict:
    """Relative differences from the undisturbed losses, and those of the undisturbed run with a worker fewer."""
    chaos = {step: abs(fewer[step] / loss - 1) for step, loss in losses.items()}
    differences = {step.step: abs(step.loss / losses[step.step] - 1) for step in steps}
    chaotic = min((step for step, difference in chaos.items() if difference > _TOLERANCE / 10), default=max(losses) + 1)
    return {
        "worst_difference": max(differences.values()),
        "worst_chaos": max(chaos.values()),
        "median_difference": statistics.median(differences.values()),
        "median_chaos": statistics.median(chaos.values()),
        "chaos_from_step": chaotic,
        "worst_before_chaos": max(difference for step, difference in differences.items() if step < chaotic),
    }


def _undisturbed(job: TrainJob, num_steps: int) -> dict[int, float]:
    with WorkerGroup(job) as group:
        group.start()
        follower = _Follower.of(group)
        follower.read(num_steps)
        return {step.step: step.loss for step in follower.steps}


def _missing(steps: list[StepSummary]) -> int:
    """Steps that were never done."""
    done = {step.step for step in steps}
    return max(done) - min(done) + 1 - len(done)


def _print(console: Console, rows: list[dict], equality: dict, num_steps: int, snapshot: dict) -> None:
    table = Table(
        "event",
        "count",
        "detect s",
        "first step s",
        "recover s: median",
        "worst",
        "stopped s: median",
        "worst",
        "repeated",
        "lost",
    )
    for kind in dict.fromkeys(row["event"] for row in rows):
        of = [row for row in rows if row["event"] == kind]
        table.add_row(
            kind, str(len(of)), _median(of, "detect_s"), _median(of, "first_step_s"), _median(of, "recover_s"),
            _worst(of, "recover_s"), _median(of, "stopped_s"), _worst(of, "stopped_s"),
            str(max(row["repeated_steps"] for row in of)), str(max(row["lost_steps"] for row in of)),
        )  # fmt: skip
    console.print(table)
    share = next(row["rate_share"] for row in rows if row["rate_share"] is not None)
    console.print(
        f"losses of {num_steps} steps within {equality['worst_difference']:.1e} (median "
        f"{equality['median_difference']:.1e}) of an undisturbed run's, before step {equality['chaos_from_step']} within "
        f"{equality['worst_before_chaos']:.1e}; undisturbed with a worker fewer: {equality['worst_chaos']:.1e} "
        f"({equality['median_chaos']:.1e})\n"
        f"one of two workers: {share:.1%} of half the rate; snapshots every {snapshot['snapshot_every']} steps, "
        f"{snapshot['snapshot_bytes'] / 1e6:.0f} MB of host memory a worker beside {snapshot['state_bytes'] / 1e6:.0f} MB of state",
        highlight=False,
    )


def _median(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{statistics.median(values):.2f}" if values else "-"


def _worst(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{max(values):.2f}" if values else "-"

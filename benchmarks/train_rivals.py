"""What a user would train with instead of raymoe: the same model, tokens, routing, precision and workers; tokens per second.

    python -m raymoe.benchmarks.train_rivals [--workers 2] [--loads balanced,hot,smartmoe] [--rivals fsdp2,...] [--steps 8]
                                             [--python FILE] [--json FILE]

A rival is a group of processes that sleep until they are told to run steps, so that several systems are timed in turns. Rivals
that need a package which does not go with raymoe's own run in another environment: `--python` names its interpreter, and raymoe
is installed there too.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from raymoe.actors.roster import KEEP_FREED_MEMORY
from raymoe.benchmarks.train_rival_common import Done, Start, Steps
from raymoe.benchmarks.train_workload import LOADS, WORKLOAD, TrainWorkload
from raymoe.telemetry import write_json

Row = dict[str, Any]
COLUMNS = ("system", "load", "workers", "step_ms", "spread", "tokens_per_s", "note")
_PREFIX = "raymoe.benchmarks.train_rival_"
_TURN = 2
_WARM_UP = 1


@dataclass(frozen=True)
class Rival:
    """How one system is started and what to know of its numbers."""

    module: str
    note: str
    packages: tuple[str, ...] = ("torch", "transformers")
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    is_single: bool = False
    """Runs in one process whatever the number of workers."""
    is_same_model: bool = True
    """transformers' model with its first weights: the first loss is the same in every system."""


RIVALS: dict[str, Rival] = {
    "transformers": Rival("plain", "one process, all tokens", is_single=True),
    "fsdp2": Rival("fsdp2", "fully_shard, parameters freed after forward"),
    "fsdp2-keep": Rival("fsdp2", "fully_shard, parameters kept for backward", options={"reshard_after_forward": False}),
    "transformers-ep": Rival(
        "ep", "expert parallelism by all-to-all, the rest fully_shard", ("torch", "transformers", "accelerate")
    ),
    "deepspeed-ep": Rival(
        "deepspeed", "AutoEP over ZeRO-1, experts by all-to-all", ("torch", "transformers", "deepspeed")
    ),
    "accelerate": Rival(
        "accelerate", "data parallel under autocast, experts in fp32", ("torch", "transformers", "accelerate")
    ),
}

UNABLE: dict[str, str] = {
    "torchtitan": "0.3.0 cannot run on CPUs: without an accelerator its device is cuda (tools/utils.py), and trainer.py calls "
    "torch.cuda.set_device, which a CPU build of torch does not have",
}
"""Systems that were tried, and what forbids them; they get a row without times."""


class RivalError(RuntimeError):
    """A rival did not start, or broke; carries what its process said last."""


class RivalGroup:
    """The processes of one rival, asleep between calls of `steps`. A context manager.

    Args:
        name: a key of `RIVALS`.
        python: interpreter with the rival's packages and raymoe; this one by default.
        timeout_s: for starting, and for one step.

    Raises:
        ValueError: an unknown rival, or workers that the batch does not split over.
        RivalError: a process did not start.
    """

    def __init__(
        self,
        name: str,
        workers: int,
        workload: TrainWorkload = WORKLOAD,
        python: str | None = None,
        timeout_s: float = 300,
    ):
        self.name, self.rival, self.workload = name, find(name), workload
        self.workers = 1 if self.rival.is_single else workers
        workload.counts("balanced", 0, self.workers)
        self.versions: dict[str, str] = {}
        self.losses: list[float] = []
        """Mean loss of every step so far, nats a token."""
        self._timeout_s = timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed by close()
        self._connections: list[Any] = []
        self._processes: list[subprocess.Popen] = []
        port = _free_port()
        try:
            for rank in range(self.workers):
                self._start(rank, port, python or sys.executable)
            self.versions = self._answers(timeout_s)[0].versions
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RivalGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self, load: str, count: int) -> list[float]:
        """Runs a step and the next `count` under a load; seconds of each but the first, of the slowest rank.

        Processes that rest give their memory back, and the first step takes it anew.

        Raises:
            ValueError: an unknown load.
            RivalError: a rank broke, or took longer than it may.
        """
        self.workload.counts(load, 0, self.workers)
        count += _WARM_UP
        self._tell(Steps(load, len(self.losses), count))
        answers = self._answers(self._timeout_s * count)
        self.losses += [statistics.fmean(step) for step in zip(*(answer.losses for answer in answers), strict=True)]
        return [max(step) for step in zip(*(answer.seconds[_WARM_UP:] for answer in answers), strict=True)]

    def close(self) -> None:
        """Ends the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()

    def _start(self, rank: int, port: int, python: str) -> None:
        ours, theirs = Pipe()
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.workers, "LOCAL_WORLD_SIZE": self.workers}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        with theirs:
            self._processes.append(
                subprocess.Popen(
                    [python, "-m", f"{_PREFIX}worker", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    # the allocator's settings of raymoe's own workers: they are not what is compared
                    env=os.environ
                    | KEEP_FREED_MEMORY
                    | {key: str(value) for key, value in group.items()}
                    | dict(self.rival.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=self._log,
                )
            )
        self._connections.append(ours)
        ours.send(
            Start(
                module=_PREFIX + self.rival.module,
                options=dict(self.rival.options),
                packages=self.rival.packages,
                workload=self.workload,
                timeout_s=self._timeout_s,
            )
        )

    def _tell(self, command: Steps) -> None:
        for connection in self._connections:
            try:
                connection.send(command)
            except OSError as error:
                raise RivalError(f"{self.name}: a process is gone; it said:\n{self._tail()}") from error

    def _answers(self, timeout_s: float) -> list[Done]:
        deadline = time.monotonic() + timeout_s
        answers: list[Done] = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                raise RivalError(
                    f"{self.name}: rank {rank} did not answer in {timeout_s:g} s; it said:\n{self._tail()}"
                )
            try:
                answer: Done = connection.recv()
            except (EOFError, ConnectionError) as error:
                raise RivalError(f"{self.name}: rank {rank} ended; it said:\n{self._tail()}") from error
            if answer.error:
                raise RivalError(f"{self.name}: rank {rank}:\n{answer.error}")
            answers.append(answer)
        return answers

    def _tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 4000))
        return self._log.read().decode(errors="replace")


def find(name: str) -> Rival:
    """Raises ValueError for a name that is not in `RIVALS`."""
    if name not in RIVALS:
        raise ValueError(f"no rival {name!r}; there are: {', '.join(RIVALS)}")
    return RIVALS[name]


def rival(name: str, workers: int, **settings: Any) -> RivalGroup:
    """`with rival("fsdp2", 2) as group: seconds = group.steps("hot", 2)`; settings as `RivalGroup` takes them."""
    return RivalGroup(name, workers, **settings)


def row_of(group: RivalGroup, load: str, seconds: Sequence[float]) -> Row:
    """What is reported of a rival's steps under one load: median and quartiles in ms, tokens of the whole batch per second."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (median,) * 3
    return {
        "system": group.name,
        "load": load,
        "workers": group.workers,
        "step_ms": 1e3 * median,
        "spread": [1e3 * low, 1e3 * high],
        "tokens_per_s": group.workload.tokens / median,
        "note": group.rival.note,
        "versions": group.versions,
    }


def run_rival(name: str, load: str, workers: int, steps: int, **settings: Any) -> Row:
    """One rival under one load, alone.

    Raises:
        ValueError, RivalError: as `RivalGroup`.
    """
    with rival(name, workers, **settings) as group:
        return row_of(group, load, group.steps(load, steps))


def measure(
    names: Sequence[str],
    loads: Sequence[str],
    workers: int,
    steps: int,
    report: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> list[Row]:
    """Several rivals in turns, at least `steps` steps of each under each load; a rival that cannot run is a row without times
    whose note says why.

    Raises:
        ValueError: an unknown rival or load, or workers that the batch does not split over.
    """
    rows: list[Row] = []
    with ExitStack() as stack:
        groups: list[RivalGroup] = []
        for name in names:
            if name in UNABLE:
                rows.append({"system": name, "workers": workers, "note": UNABLE[name]})
                continue
            try:
                group = stack.enter_context(rival(name, workers, **settings))
                group.steps(loads[0], 0)
            except RivalError as error:
                report(str(error))
                rows.append({"system": name, "workers": workers, "note": str(error).strip().rpartition("\n")[2]})
            else:
                groups.append(group)
        for load in loads:
            seconds: dict[str, list[float]] = {group.name: [] for group in groups}
            for turn in range(0, steps, _TURN):
                for group in groups:
                    seconds[group.name] += group.steps(load, _TURN)
                report(f"{load}: {min(turn + _TURN, steps)} of {steps} steps")
            rows += [row_of(group, load, seconds[group.name]) for group in groups]
    return rows


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _table(rows: Sequence[Row]) -> Table:
    table = Table(*COLUMNS)
    for row in rows:
        cells = dict(row)
        if "step_ms" in row:
            cells |= {"step_ms": f"{row['step_ms']:.0f}", "tokens_per_s": f"{row['tokens_per_s']:.0f}"}
            cells["spread"] = "{:.0f} to {:.0f}".format(*row["spread"])
        table.add_row(*(str(cells.get(column, "-")) for column in COLUMNS))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m raymoe.benchmarks.train_rivals", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--rivals", default=",".join([*RIVALS, *UNABLE]))
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each rival under each load")
    parser.add_argument("--python", help="interpreter that has the rivals' packages and raymoe; this one by default")
    parser.add_argument("--json", help="write the rows there")
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    rows = measure(
        given.rivals.split(","),
        given.loads.split(","),
        given.workers,
        given.steps,
        report=lambda line: console.log(line, markup=False),
        python=given.python,
    )
    Console().print(_table(rows))
    if given.json:
        command = shlex.join(["python", "-m", "raymoe.benchmarks.train_rivals", *(arguments or sys.argv[1:])])
        write_json(given.json, command, rows)


if __name__ == "__main__":
    main()

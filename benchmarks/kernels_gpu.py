"""Check, tune and time the kernels on a CUDA device, in one call that survives every single failure.

    python -m benchmarks.kernels_gpu --out DIR [--budget-s 540] [--tune] [--wheels DIR] [--quick]

What it needs: this repository, not installed; torch, triton, transformers, rich and pyarrow; and for the rivals that are not in
them the wheels liger_kernel-0.8.5-py3-none-any.whl and moe_ops-0.1.0-py3-none-any.whl in the folder that --wheels names (they are
unpacked, not installed). Nothing is downloaded.

Phases, each in processes of its own, started anew behind a piece that crashes or hangs; the times are estimates for 16 cores:
  device   what is there, and its two ceilings                                        20 s
  farm     compiles ahead in the background while the checks run                    1-3 min
  checks   every GEMM in every tile, and the layer with all its variants            1-3 min
  tune     (--tune) times the candidates, writes DIR/table.json and kernels/tables/ 3-5 min
  times    the table, what the targets name first                             the rest
Two calls are better than one: `--tune --only device,checks,tune` first; then put DIR/table.json where the first call says, and run
`--only device,times`. After every phase DIR/results.json is whole. The exit code is 1 if a check failed, 2 if a phase did not run.

--quick is the same code at toy size, on a CPU in this process; with TRITON_INTERPRET=1 our kernels run there too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from raymoe.benchmarks import kernel_phases as phases
from raymoe.benchmarks.kernel_jobs import Row, supervise
from raymoe.benchmarks.kernel_targets import noise, summary, tables
from raymoe.benchmarks.kernel_times import COLUMNS
from raymoe.telemetry import write_json

_CHECK_COLUMNS = ("check", "ok", "error", "limit", "note")
_SUMMARY_COLUMNS = ("target", "wanted", "found", "reached")
# seconds a phase may take, where the budget allows
_LIMITS = {"device": 60.0, "checks": 240.0, "tune": 300.0, "times": float("inf")}
_STALL_S = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--only", default="device,checks,tune,times", help="phases, comma-separated")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        shard, num_shards = map(int, arguments.shard.split("/"))
        phases.work(
            arguments.worker,
            arguments.out,
            arguments.deadline,
            is_quick=arguments.quick,
            shard=shard,
            num_shards=num_shards,
        )
        return 0
    wanted = [name for name in arguments.only.split(",") if name != "tune" or arguments.tune]
    if unknown := set(wanted) - set(_LIMITS):
        parser.error(f"--only has {', '.join(sorted(unknown))}; use {', '.join(_LIMITS)}")
    return _Run(arguments, wanted, sys.argv[1:] if argv is None else argv).go()


class _Run:
    """The parent: it never touches the device itself."""

    def __init__(self, arguments: argparse.Namespace, wanted: list[str], command: Sequence[str]) -> None:
        self._out: Path = arguments.out
        self._out.mkdir(parents=True, exist_ok=True)
        self._deadline = time.time() + arguments.budget_s
        self._is_quick, self._with_tune, self._wanted = arguments.quick, "tune" in wanted, wanted
        self._command = "python -m benchmarks.kernels_gpu " + " ".join(command)
        self._console = Console(width=170)
        # the checks and the farm run side by side
        self._processes = max(1, ((os.cpu_count() or 2) - 2) // 2)
        self._environment = dict(os.environ)
        if arguments.wheels:
            self._environment["PYTHONPATH"] = _unpacked(arguments.wheels, Path(tempfile.mkdtemp(prefix="rivals-")))
        # files of an earlier run in this folder would be taken for this one's
        for path in self._out.glob("*.jsonl"):
            path.unlink()

    def go(self) -> int:
        farm: list[subprocess.Popen] = []
        try:
            for phase in self._wanted:
                if phase == "checks" or (phase == "times" and not farm):
                    farm = farm or self._start_farm()
                if phase in ("tune", "times"):
                    self._await(farm)
                started = time.time()
                self._console.print(f"[bold]{phase}[/bold] {datetime.now(UTC):%H:%M:%S}")
                self._run_phase(phase)
                if phase == "tune":
                    self._console.print(phases.store_table(self._out, is_quick=self._is_quick))
                self._save()
                self._print(phase)
                self._console.print(f"{phase} took {time.time() - started:.0f} s")
        finally:
            for process in farm:
                process.kill()
        found = summary(self._rows("checks"), self._rows("times"))
        for table in tables("against the targets", _SUMMARY_COLUMNS, found):
            self._console.print(table)
        if (share := noise(self._rows("times"))) is not None:
            self._console.print(
                f"the same contender twice differs by at most {100 * share:.1f} %: a smaller gain is none"
            )
        self._save()
        failed = [row for row in self._rows("checks") if row.get("failed") or row.get("ok") is False]
        missing = [phase for phase in self._wanted if not self._rows(phase)]
        return 1 if failed else 2 if missing else 0

    def _run_phase(self, phase: str) -> None:
        deadline = min(self._deadline, time.time() + _LIMITS[phase])
        if self._is_quick:
            phases.work(phase, self._out, deadline, is_quick=True)
            return
        count = self._processes if phase == "checks" else 1
        command = [sys.executable, "-m", "benchmarks.kernels_gpu", "--out", str(self._out), "--worker", phase]
        with ThreadPoolExecutor(count) as pool:
            for shard in range(count):
                pool.submit(
                    supervise,
                    [*command, "--deadline", str(deadline), "--shard", f"{shard}/{count}"],
                    phases.journal_of(self._out, phase, shard),
                    phases.error_row,
                    deadline=deadline,
                    stall_s=_STALL_S,
                    environment=self._environment,
                    log=self._out / f"{phase}-{shard}.log",
                )

    def _start_farm(self) -> list[subprocess.Popen]:
        if self._is_quick:
            return []
        count, farm = self._processes, []
        for at in range(count):
            command = [sys.executable, "-m", "benchmarks.kernel_farm", "--shard", str(at), "--of", str(count)]
            command += ["--deadline", str(self._deadline - 60), *(["--tune"] if self._with_tune else [])]
            with (self._out / f"farm-{at}.log").open("w") as log:
                farm.append(subprocess.Popen(command, stdout=log, stderr=log, env=self._environment))
        return farm

    def _await(self, farm: list[subprocess.Popen]) -> None:
        """Compilers beside a measurement would slow its launches: wait for them, though not for ever."""
        patience = time.time() + min(150.0, max(0.0, (self._deadline - time.time()) / 3))
        while any(process.poll() is None for process in farm) and time.time() < patience:
            time.sleep(0.5)
        for process in farm:
            process.kill()

    def _rows(self, phase: str) -> list[Row]:
        return phases.rows_of(self._out, phase)

    def _save(self) -> None:
        others = {phase: self._rows(phase) for phase in ("device", "checks", "tune")}
        others["summary"] = summary(others["checks"], self._rows("times"))
        write_json(self._out / "results.json", self._command, self._rows("times"), others)

    def _print(self, phase: str) -> None:
        rows = self._rows(phase)
        printed = {
            "device": lambda: [str(row) for row in rows],
            "checks": lambda: _failed_checks(rows),
            "tune": lambda: tables("winners", ("kind", "bucket", "config"), [r for r in rows if r["note"] == "wins"]),
            "times": lambda: tables("times", COLUMNS, rows),
        }[phase]
        for item in printed():
            self._console.print(item)


def _failed_checks(rows: list[Row]) -> list:
    bad = [row for row in rows if not row.get("ok") and not row.get("skipped")]
    skipped = sum(bool(row.get("skipped")) for row in rows)
    counts = f"{len(rows) - len(bad) - skipped} checks hold, {len(bad)} do not, {skipped} left out for want of time"
    return [*tables("checks that failed", _CHECK_COLUMNS, bad), counts]


def _unpacked(wheels: Path, folder: Path) -> str:
    """Search path with the content of pure Python wheels in front."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return os.pathsep.join(filter(None, [str(folder.resolve()), os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    # printed here, so that a log shows it before anything can go wrong
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    sys.exit(main())

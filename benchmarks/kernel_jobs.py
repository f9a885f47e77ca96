"""Run a list of named pieces of work so that none can take the others down, and keep what each gave as it comes.

A piece that raises becomes a row with the error. One that kills its process (an illegal address ends a CUDA context) or hangs is
noted, and a fresh process goes on behind it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_MAX_PROCESSES = 12
_BROKEN_DEVICE = 3


class Journal:
    """What a worker has begun, found and ended: one JSON object a line, written at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rows(self) -> list[Row]:
        return [line["row"] for line in self._lines() if "row" in line]

    def ended(self) -> set[str]:
        """Pieces that are done, with or without an error."""
        return {line["end"] for line in self._lines() if "end" in line}

    def fatal(self) -> set[str]:
        """Pieces that took their process down: never to be tried again."""
        return {line["end"] for line in self._lines() if line.get("fatal")}

    def open_pieces(self) -> list[str]:
        """Pieces that the last process has begun and not ended, the innermost last."""
        still_open: list[str] = []
        for line in self._lines():
            if "process" in line:
                still_open = []
            elif "begin" in line:
                still_open.append(line["begin"])
            elif line.get("end") in still_open:
                still_open.remove(line["end"])
        return still_open

    def new_process(self) -> None:
        """A worker says that it starts."""
        self._append({"process": os.getpid()})

    def add(self, row: Row) -> None:
        self._append({"row": row})

    @contextmanager
    def piece(self, name: str, error_row: Row) -> Iterator[None]:
        """Within: an exception is written as `error_row` with the error in it, and goes no further."""
        self._append({"begin": name})
        try:
            yield
        except Exception as error:
            self.add({**error_row, "note": describe(error), "failed": True})
            traceback.print_exc(limit=4)
            is_broken = _is_device_broken()
            self._append({"end": name, "fatal": is_broken})
            if is_broken:
                sys.exit(_BROKEN_DEVICE)
        else:
            self._append({"end": name})

    def give_up(self, name: str, row: Row) -> None:
        """Note that `name` took its process down."""
        self.add({**row, "failed": True})
        self._append({"end": name, "fatal": True})

    def _append(self, line: Row) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[Row]:
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines()
        # the last line of a killed process may be cut
        return [json.loads(line) for line in lines if line.endswith("}")]


def describe(error: Exception) -> str:
    """The error's class and the start of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _is_device_broken() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return True
    return False


def run_pieces(
    journal: Journal,
    names: Sequence[str],
    work: Callable[[str], None],
    error_row: Callable[[str], Row],
    deadline: float,
) -> None:
    """In a worker: do the pieces that are not ended yet, in order, until `deadline` (of time.time)."""
    journal.new_process()
    ended = journal.ended()
    for name in names:
        if name in ended:
            continue
        if time.time() > deadline:
            journal.add({**error_row(name), "note": "no time left", "skipped": True})
            continue
        with journal.piece(name, error_row(name)):
            work(name)


def supervise(
    command: Sequence[str],
    journal: Journal,
    error_row: Callable[[str], Row],
    *,
    deadline: float,
    stall_s: float = 150.0,
    environment: dict[str, str] | None = None,
    log: Path,
) -> None:
    """Run a worker that writes `journal` until it ends by itself, starting it anew behind a piece that took it down.

    Args:
        stall_s: a worker whose journal does not grow for so long is stopped.
        deadline: of time.time; a worker is stopped a little after it.
    """
    for _ in range(_MAX_PROCESSES):
        code, reason = _watch(command, journal, deadline, stall_s, environment, log)
        if code == 0 or time.time() > deadline:
            break
        if code == _BROKEN_DEVICE:
            # it has named the piece itself
            continue
        still_open = journal.open_pieces()
        if not still_open:
            journal.add({"note": f"worker {reason} outside any piece; see {log.name}", "failed": True})
            break
        # the innermost is to blame: the outer ones get another try without it
        journal.give_up(still_open[-1], {**error_row(still_open[-1]), "note": f"worker {reason}"})


def _watch(
    command: Sequence[str], journal: Journal, deadline: float, stall_s: float, environment: dict | None, log: Path
) -> tuple[int, str]:
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        seen, since = -1, time.time()
        while (code := process.poll()) is None:
            size = journal._path.stat().st_size if journal._path.exists() else 0
            if size != seen:
                seen, since = size, time.time()
            now = time.time()
            if now - since > stall_s or now > deadline + 15:
                process.kill()
                process.wait()
                return -9, f"stopped: nothing new for {now - since:.0f} s"
            time.sleep(0.2)
    return code, f"ended with code {code}"

"""A training run as JSON lines."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class JsonLinesLogger:
    """One JSON object a line: ``kind`` (start, step, event or end), ``time`` (seconds since 1970), and what belongs to it.

    A line is with the system as soon as it is logged, so that a crash of this process loses none. When a run goes on, the file
    does too: what it says of steps that will come again is taken out first, and with it a last line that was torn. A run from
    step 0 begins a new file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: TextIO | None = None

    def start(self, run: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the file to go on with has a line that is none of ours; names it. The file stays as it is.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        next_step = run.get("next_step", 0)
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        try:
            with partial.open("w", encoding="utf-8") as kept:
                if next_step > 0 and self._path.exists():
                    self._keep(kept, next_step)
            os.replace(partial, self._path)
        finally:
            partial.unlink(missing_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        self._write({"kind": "start", "time": time.time(), "run": run})

    def step(self, number: int, values: dict[str, float]) -> None:
        self._write({"kind": "step", "time": time.time(), "step": number, **values})

    def event(self, number: int, name: str, fields: dict[str, Any]) -> None:
        self._write({"kind": "event", "time": time.time(), "step": number, "event": name, **fields})

    def end(self, summary: dict[str, Any]) -> None:
        if self._file is not None:
            self._write({"kind": "end", "time": time.time(), "summary": summary})
            self._file.close()
            self._file = None

    def _keep(self, kept: TextIO, next_step: int) -> None:
        with self._path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    break  # torn, and so the last
                try:
                    entry = json.loads(raw)
                    is_coming_again = entry.get("step", -1) >= next_step
                except (ValueError, AttributeError, TypeError):
                    raise ValueError(
                        f"{self._path}, line {number}: not an entry of a run's log; move the file away to begin a new one"
                    ) from None
                if not is_coming_again:
                    kept.write(raw.decode("utf-8"))

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._file is not None, "start() comes first"
        self._file.write(json.dumps(_sayable(entry), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        self._file.flush()


def _sayable(value: Any) -> Any:
    """The value with None where JSON has no number."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _sayable(item) for key, item in value.items()}
    return [_sayable(item) for item in value] if isinstance(value, list | tuple) else value

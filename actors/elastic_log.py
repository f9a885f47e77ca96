"""What happens to a run besides steps: deaths, joins, rollbacks. Kept in a file as well, so that a restart forgets nothing."""

import json
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raymoe.telemetry import metrics

_KEPT = 1000


@dataclass(frozen=True)
class RunEvent:
    """One of them."""

    number: int
    """From 0, in the order in which they happened."""
    time_s: float
    """Since 1970."""
    kind: str
    """`epoch`, `death`, `hang`, `rollback`, `restore`, `join`, `leave`, `waiting`, `re-shard`, `fallback`, `controller`,
    `saved`, `failed`."""
    step: int
    """The next step to do when it happened."""
    text: str
    values: dict[str, Any] = field(default_factory=dict)


class ElasticLog:
    """Appends to `path`, a line of JSON an event.

    Args:
        is_new: a run begins; what an earlier one wrote goes.
    """

    def __init__(self, path: Path, is_new: bool):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_new:
            path.unlink(missing_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._events: deque[RunEvent] = deque((RunEvent(**json.loads(line)) for line in lines[-_KEPT:]), maxlen=_KEPT)
        self._next = self._events[-1].number + 1 if self._events else 0

    def add(self, kind: str, step: int, text: str, **values: Any) -> None:
        """Something happened."""
        event = RunEvent(self._next, time.time(), kind, step, text, values)
        self._next += 1
        self._events.append(event)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event)) + "\n")
        metrics.TRAIN_EVENTS_TOTAL.inc(1, kind=kind)

    def since(self, number: int) -> list[RunEvent]:
        """Events from `number` on, as far back as they are kept."""
        return [event for event in list(self._events) if event.number >= number]

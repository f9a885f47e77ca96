"""Do something once a node, however many processes want it done: a file lock and a marker."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)
_POLL_S = 0.05


def once_per_node(
    folder: Path,
    key: str,
    work: Callable[[], None],
    *,
    notes: dict[str, Any] | None = None,
    timeout_s: float = 900.0,
) -> bool:
    """Run `work` in this process, the first time on this node while the others wait; True if this was the first time.

    Every caller runs `work` once: the first fills the cache that `work` uses, under the lock; the others, let through
    together, then find it full. A process that dies or raises in `work` lets go of the lock and leaves no marker, so the
    next one is first. After `timeout_s` of waiting for a live holder a process goes ahead on its own.

    Args:
        folder: shared by the node's processes; made if missing. Markers belong beside the cache, to vanish with it.
        key: names the work; anything that changes its result must change the key. Letters that a file name can have.
        notes: written into the marker, for people.
    """
    marker = folder / f"{key}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not marker.exists():
        with _locked(folder / f"{key}.lock", timeout_s) as is_held:
            if is_held and not marker.exists():
                started = time.perf_counter()
                work()
                _write_whole(marker, {**(notes or {}), "seconds": round(time.perf_counter() - started, 3)})
                return True
            if not is_held:
                _logger.warning(
                    "waited %.0f s for another process to finish %s in %s; going ahead alone", timeout_s, key, folder
                )
    work()
    return False


@contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[bool]:
    """Whether the lock came within the time; the system takes it back when its holder ends, however it ends."""
    deadline = time.monotonic() + timeout_s
    with path.open("a") as file:
        is_held = _try_lock(file.fileno())
        while not is_held and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            is_held = _try_lock(file.fileno())
        # closing the file lets go
        yield is_held


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    # a reader sees the marker whole or not at all
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)

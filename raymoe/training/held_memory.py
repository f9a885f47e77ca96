"""Memory of a CPU worker that its allocator holds back for the next step.

Workers run with an allocator told never to give memory back (`raymoe.actors.roster.KEEP_FREED_MEMORY`): faulting it in anew took
up to half of a step. Where sizes differ from step to step the heap may be cut up and grow; then it is given back once, and held
anew.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

_GROWTH = 1.5


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


class HeldMemory:
    """Call `after_step` after each step.

    Args:
        growth: resident memory may become so many times what it was after the first step.
    """

    def __init__(self, growth: float = _GROWTH):
        self._growth = growth
        self._first: int | None = None
        self.num_returns = 0
        """How often memory was given back."""
        self._giver = _giver_back()

    def after_step(self) -> None:
        """Gives free memory back to the kernel if there has come to be too much of it."""
        if self._giver is None:
            return
        resident = resident_bytes()
        if self._first is None:
            self._first = resident
        elif resident > self._growth * self._first:
            self.give_back()

    def give_back(self) -> None:
        """Gives all free memory back to the kernel."""
        if self._giver is not None:
            self._giver()
            self.num_returns += 1
            # the next step says how much is needed by now
            self._first = None


def _giver_back() -> Callable[[], object] | None:
    """The way of this process's allocator, jemalloc or glibc's own, to give free memory back; None for another C library."""
    process = ctypes.CDLL(None)
    if hasattr(process, "mallctl"):
        # 4096 stands for all arenas
        return lambda: process.mallctl(b"arena.4096.purge", None, None, None, ctypes.c_size_t(0))
    if hasattr(process, "malloc_trim"):
        return lambda: process.malloc_trim(0)
    return None

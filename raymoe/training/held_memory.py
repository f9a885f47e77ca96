"""Memory of a CPU worker that the C library holds back for the next step.

Workers run with glibc told never to give memory back (`raymoe.actors.roster.KEEP_FREED_MEMORY`): faulting it in anew took up to
half of a step. Where sizes differ from step to step the heap is cut up and grows; then it is given back once, and held anew.
"""

import ctypes
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
        self.num_trims = 0
        """How often memory was given back."""
        try:
            self._trim = ctypes.CDLL("libc.so.6").malloc_trim
        except (OSError, AttributeError):  # another C library
            self._trim = None

    def after_step(self) -> None:
        """Gives free memory back to the kernel if there has come to be too much of it."""
        if self._trim is None:
            return
        resident = resident_bytes()
        if self._first is None:
            self._first = resident
        elif resident > self._growth * self._first:
            self._trim(0)
            self.num_trims += 1
            # the next step says how much is needed by now
            self._first = None

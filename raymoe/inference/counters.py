"""What the expert cache did, counted: all in all and by time."""

import time
from collections import deque
from dataclasses import dataclass, fields, replace


@dataclass
class CacheCounters:
    """What happened in a span of time, in experts and bytes."""

    hits: int = 0
    """Wanted experts that were in a slot."""
    late: int = 0
    """Wanted experts that were on their way already."""
    misses: int = 0
    """Wanted experts that nobody had fetched."""
    prefetched: int = 0
    """Experts fetched before anybody wanted them."""
    wasted: int = 0
    """Those of them that went again before anybody did."""
    fetched_bytes: int = 0
    """That the tiers below delivered, for whatever reason."""
    wasted_bytes: int = 0
    demand_reads: int = 0
    """Reads of experts that somebody waited for when they began."""
    demand_read_s: float = 0.0
    """Seconds that those took, summed over threads."""
    stall_s: float = 0.0
    """Seconds in which a computation waited for experts, or fetched them itself."""

    def __sub__(self, earlier: "CacheCounters") -> "CacheCounters":
        """What has happened since."""
        return CacheCounters(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(CacheCounters)))

    @property
    def hit_rate(self) -> float | None:
        """Share of the wanted experts that were there; None if none was wanted."""
        wanted = self.hits + self.late + self.misses
        return self.hits / wanted if wanted else None


@dataclass
class CacheWindow(CacheCounters):
    """One point of the history: the span that starts at `start_s` seconds after the cache was made."""

    start_s: float = 0.0
    resident: int = 0


class CacheHistory:
    """Counts into a total and into windows of `window_s`; the last 600 with traffic are kept. Not locked."""

    def __init__(self, window_s: float):
        self.total = CacheCounters()
        self._start_s = time.monotonic()
        self._window_s = window_s
        self._windows: deque[CacheWindow] = deque([CacheWindow()], maxlen=600)

    def count(self, resident: int, **amounts: float) -> None:
        """Adds to the counters of those names."""
        elapsed_s = time.monotonic() - self._start_s
        window = self._windows[-1]
        if elapsed_s >= window.start_s + self._window_s:
            window = CacheWindow(start_s=elapsed_s - elapsed_s % self._window_s)
            self._windows.append(window)
        window.resident = resident
        for name, amount in amounts.items():
            setattr(window, name, getattr(window, name) + amount)
            setattr(self.total, name, getattr(self.total, name) + amount)

    def windows(self) -> list[CacheWindow]:
        """Copies, oldest first."""
        return [replace(window) for window in self._windows]

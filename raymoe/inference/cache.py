"""The expert cache: a fixed pool of slots, one expert each, shared by all MoE layers, filled from the tier below."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import torch

from raymoe.config import parse_memory
from raymoe.inference.eviction import EvictionPolicy, Key, LeastRecentlyUsed
from raymoe.inference.tiers import ExpertSource


@dataclass
class CacheCounters:
    """What happened in a span of time, in experts and bytes."""

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of the wanted experts that were resident; None if none was wanted."""
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else None


@dataclass
class CacheWindow(CacheCounters):
    """One point of the history: the span that starts at `start_s` seconds after the cache was made."""

    start_s: float = 0.0
    resident: int = 0


def slots_for(budget: str | int, num_experts: int, expert_bytes: int) -> int:
    """How many experts of `expert_bytes` fit a budget such as "50%" (of all experts) or "512MiB", at most all of them.

    Raises:
        ValueError: the budget is malformed, or holds not even one expert; names the smallest that does.
    """
    total_bytes = num_experts * expert_bytes
    budget_bytes = parse_memory(budget, total_bytes)
    if budget_bytes < expert_bytes:
        # rounded up to three digits, so that the share named here is itself enough
        share = -(-100_000 * expert_bytes // total_bytes) / 1000
        raise ValueError(
            f"expert_memory: {budget} is {budget_bytes} bytes, less than one expert. The smallest budget that works is "
            f"{expert_bytes} bytes, or {share:g}% of the {total_bytes} bytes that all {num_experts} experts take."
        )
    return min(budget_bytes // expert_bytes, num_experts)


class ExpertCache:
    """Slots [slots, numel] and who is in them. Safe to use from several threads.

    A slot is handed out pinned and never overwritten before its user has asked for the next group (or let go of the
    iterator); kernels that still run on a CUDA stream are covered as long as the source copies on that same stream.
    """

    def __init__(
        self,
        source: ExpertSource,
        *,
        numel: Sequence[int],
        num_experts: Sequence[int],
        budget: str | int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        policy: Callable[[int, int], EvictionPolicy] = LeastRecentlyUsed,
        window_s: float = 1.0,
    ):
        """Allocates the pool.

        Args:
            source: the tier below.
            numel: elements of one expert, for each MoE layer; a slot is as large as the largest.
            num_experts: experts of each MoE layer.
            budget: bytes, or a share of what all experts would take, see `raymoe.config.parse_memory`.
            policy: makes the eviction policy from (layers, slots).
            window_s: seconds that one point of `history` covers.

        Raises:
            ValueError: the budget does not hold one expert.
        """
        self._source = source
        self._numel = list(numel)
        self.num_experts = sum(num_experts)
        self.slot_bytes = max(numel) * dtype.itemsize
        self.num_slots = slots_for(budget, self.num_experts, self.slot_bytes)
        self.pool = torch.zeros(self.num_slots, max(numel), dtype=dtype, device=device)
        """[slots, numel]. Read only what `acquire` has handed out."""
        self._policy = policy(len(self._numel), self.num_slots)
        self._changed = threading.Condition()
        self._slot: dict[Key, int] = {}
        self._ready: set[Key] = set()
        self._pins: dict[Key, int] = {}
        self._empty = list(range(self.num_slots - 1, -1, -1))
        self.total = CacheCounters()
        self._start_s = time.monotonic()
        self._window_s = window_s
        self._windows: deque[CacheWindow] = deque([CacheWindow()], maxlen=600)

    @property
    def budget_bytes(self) -> int:
        """Bytes of the pool."""
        return self.num_slots * self.slot_bytes

    @property
    def resident(self) -> int:
        """Experts that are in a slot now."""
        with self._changed:
            return len(self._ready)

    def history(self) -> list[CacheWindow]:
        """Windows with traffic, oldest first (at most the last 600), for a plot."""
        with self._changed:
            return [replace(window) for window in self._windows]

    def acquire(self, layer: int, experts: Sequence[int]) -> Generator[tuple[list[int], list[int]], None, None]:
        """Hands out the slots of `experts` (distinct) of one layer: those that are resident first, then fetched ones.

        Yields:
            (experts, their slots), disjoint groups that together are `experts`. A group's slots stay as they are until the
            next group is asked for or the iterator is closed. There are several groups of fetched experts if they do not
            fit at once; one slot is enough for any number of experts.
        """
        waiting = list(dict.fromkeys(experts))
        assert len(waiting) == len(experts), "experts must be distinct"
        while waiting:
            group, slots, is_hit = self._claim(layer, waiting)
            try:
                if not is_hit:
                    self._fetch(layer, group, slots)
                yield group, slots
            finally:
                self._release(layer, group)
            taken = set(group)
            waiting = [expert for expert in waiting if expert not in taken]

    def _claim(self, layer: int, waiting: list[int]) -> tuple[list[int], list[int], bool]:
        """Pins the residents among `waiting`, else as many slots as are free for the others; waits while neither is to be had.

        Nothing is held while waiting, so threads cannot wait for each other in a circle.
        """
        with self._changed:
            while True:
                group = [expert for expert in waiting if (layer, expert) in self._ready]
                is_hit = bool(group)
                if is_hit:
                    self._policy.used(layer, group)
                else:
                    group = self._make_room(layer, waiting)
                if group:
                    for expert in group:
                        self._pins[layer, expert] = self._pins.get((layer, expert), 0) + 1
                    self._count(hits=len(group) if is_hit else 0, misses=0 if is_hit else len(group))
                    return group, [self._slot[layer, expert] for expert in group], is_hit
                self._changed.wait()

    def _make_room(self, layer: int, waiting: list[int]) -> list[int]:
        """Gives slots to as many of `waiting` as possible; those that another thread is fetching right now are left to it."""
        group: list[int] = []
        for expert in waiting:
            if (layer, expert) in self._slot:
                continue
            if not self._empty:
                victim = self._policy.victim(layer, self._is_free)
                if victim is None:
                    break
                self._drop(victim)
            self._slot[layer, expert] = self._empty.pop()
            self._policy.used(layer, [expert])
            group.append(expert)
        return group

    def _is_free(self, key: Key) -> bool:
        return key in self._ready and key not in self._pins

    def _drop(self, key: Key) -> None:
        self._empty.append(self._slot.pop(key))
        self._ready.discard(key)
        self._policy.dropped(*key)

    def _fetch(self, layer: int, group: list[int], slots: list[int]) -> None:
        numel = self._numel[layer]
        moved_bytes = 0
        for expert, slot in zip(group, slots, strict=True):
            moved_bytes += self._source.read(layer, expert, self.pool[slot, :numel])
        with self._changed:
            self._ready.update((layer, expert) for expert in group)
            self._count(fetched_bytes=moved_bytes)
            self._changed.notify_all()

    def _release(self, layer: int, group: list[int]) -> None:
        with self._changed:
            for expert in group:
                key = (layer, expert)
                self._pins[key] -= 1
                if not self._pins[key]:
                    del self._pins[key]
                if key not in self._ready:
                    # its read failed
                    self._drop(key)
            self._changed.notify_all()

    def _count(self, hits: int = 0, misses: int = 0, fetched_bytes: int = 0) -> None:
        elapsed_s = time.monotonic() - self._start_s
        window = self._windows[-1]
        if elapsed_s >= window.start_s + self._window_s:
            window = CacheWindow(start_s=elapsed_s - elapsed_s % self._window_s)
            self._windows.append(window)
        window.resident = len(self._ready)
        for counters in (self.total, window):
            counters.hits += hits
            counters.misses += misses
            counters.fetched_bytes += fetched_bytes

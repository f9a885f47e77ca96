"""The expert cache: slots of one expert each, shared by all MoE layers, filled from the tiers below on demand and ahead of it."""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from raymoe.config import check_fits
from raymoe.inference.counters import CacheCounters, CacheHistory, CacheWindow
from raymoe.inference.eviction import EvictionPolicy, Key, LeastRecentlyUsed
from raymoe.inference.slot_order import CudaSlotOrder, SlotOrder
from raymoe.inference.slots import SlotPool, slots_for
from raymoe.inference.tiers import ExpertSource


class _Job(NamedTuple):
    """A read that is to be done, into a slot that is its own."""

    key: Key
    slot: int
    is_wish: bool


class ExpertCache:
    """Slots [slots, numel] and who is in them. Safe to use from several threads.

    A slot is handed out pinned and never overwritten before its user has asked for the next group (or let go of the iterator).
    What is wanted now is read before what may be wanted later; a wish gets its slot only when its read begins, so one that is
    withdrawn before that has cost nothing. `close` ends the reading threads.
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
        total_bytes: int | None = None,
        policy: Callable[[int, int], EvictionPolicy] = LeastRecentlyUsed,
        readers: int = 0,
        window_s: float = 1.0,
        arena: torch.Tensor | None = None,
    ):
        """Reserves the pool and starts the reading threads.

        Args:
            source: the tiers below.
            numel: elements of one expert, for each MoE layer; a slot is as large as the largest.
            num_experts: experts of each MoE layer.
            budget: bytes, or a share of `total_bytes`, see `raymoe.config.parse_memory`.
            total_bytes: what all experts would take; default: in slots of this size.
            policy: makes the eviction policy from (layers, slots).
            readers: threads that read while others compute; without any, who needs an expert reads it, and nothing is
                fetched ahead.
            window_s: seconds that one point of `history` covers.
            arena: [all experts, at least numel of the largest] where they are already, in the order of layers: computed with in
                place of slots. Nothing is read, and there is no budget.

        Raises:
            ValueError: the budget does not hold one expert, or is more memory than the process may have.
        """
        self._source = source
        self._numel = list(numel)
        self.num_experts = sum(num_experts)
        self._most_experts = max(num_experts)
        self.slot_bytes = max(numel) * dtype.itemsize
        self._total_bytes = total_bytes or self.num_experts * self.slot_bytes
        device = torch.device(device)
        num_slots = self._slots_for(budget) if arena is None else self.num_experts
        if arena is not None:
            assert len(arena) == self.num_experts, "an arena holds all experts"
            self._slots = SlotPool.of(arena)
        else:
            if device.type == "cpu":
                check_fits(f"expert_memory: {budget}", num_slots * self.slot_bytes)
            self._slots = SlotPool(self.num_experts, num_slots, max(numel), dtype, device)
        self._has_arena = arena is not None
        self._order = CudaSlotOrder(num_slots, device) if device.type == "cuda" else SlotOrder()
        self._policy = policy(len(self._numel), num_slots)
        self._changed = threading.Condition()
        everyone = [(layer, expert) for layer, count in enumerate(num_experts) for expert in range(count)]
        self._slot: dict[Key, int] = {key: slot for slot, key in enumerate(everyone)} if arena is not None else {}
        self._ready: set[Key] = set(self._slot)
        self._pins: dict[Key, int] = {}
        self._demanded: dict[Key, None] = {}
        self._failed: dict[Key, BaseException] = {}
        self._wishes: list[Key] = []
        self._unused: dict[Key, int] = {}
        self._history = CacheHistory(window_s)
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"expert-reader-{i}", daemon=True) for i in range(readers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pool(self) -> torch.Tensor:
        """[slots, numel]. Read only what `acquire` has handed out."""
        return self._slots.tensor

    @property
    def num_slots(self) -> int:
        """Experts that the budget allows, or that are in the arena."""
        return self._slots.limit

    @property
    def budget_bytes(self) -> int:
        """Bytes that the slots may take."""
        return self.num_slots * self.slot_bytes

    @property
    def resident(self) -> int:
        """Experts that are in a slot now."""
        with self._changed:
            return len(self._ready)

    @property
    def total(self) -> CacheCounters:
        """Since the beginning."""
        return self._history.total

    def totals(self) -> CacheCounters:
        """`total` as it is now."""
        with self._changed:
            return replace(self._history.total)

    @property
    def reads_ahead(self) -> bool:
        """Whether wishes are ever fetched."""
        return bool(self._threads)

    def history(self) -> list[CacheWindow]:
        """Windows with traffic, oldest first (at most the last 600), for a plot."""
        with self._changed:
            return self._history.windows()

    def residents(self) -> np.ndarray:
        """bool [L, E], E of the layer with the most: the experts that are in a slot now."""
        found = np.zeros((len(self._numel), self._most_experts), dtype=bool)
        with self._changed:
            keys = list(self._ready)
        if keys:
            found[tuple(zip(*keys, strict=True))] = True
        return found

    def acquire(self, layer: int, experts: Sequence[int]) -> Generator[tuple[list[int], list[int]], None, None]:
        """Hands out the slots of `experts` (distinct) of one layer: those that are resident first, others as they come.

        They are wanted, and the reading threads at work on them, from this call on; iterate to the end, or close.

        Yields:
            (experts, their slots), disjoint groups that together are `experts`. A group's slots stay as they are until the
            next group is asked for or the iterator is closed. One slot is enough for any number of experts.
        """
        groups = self._groups(layer, experts)
        next(groups)
        return groups

    def _groups(self, layer: int, experts: Sequence[int]) -> Generator[tuple[list[int], list[int]], None, None]:
        """`acquire`, with a first group of nothing once all are wanted."""
        waiting = dict.fromkeys((layer, expert) for expert in experts)
        assert len(waiting) == len(experts), "experts must be distinct"
        self._demand(layer, waiting)
        try:
            yield [], []
            while waiting:
                group = self._arrived(waiting)
                slots = [self._slot[key] for key in group]
                self._order.before_use(slots)
                yield [expert for _, expert in group], slots
                self._order.used(slots)
                for key in group:
                    del waiting[key]
                self._release(group)
        finally:
            self._release(list(waiting))

    def absent(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of `experts` that are in no slot and not on their way to one, in their order."""
        with self._changed:
            return [expert for expert in experts if (layer, expert) not in self._slot]

    def unready(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of `experts` that whoever asked for now would have to wait for."""
        with self._changed:
            return [expert for expert in experts if (layer, expert) not in self._ready]

    def expect(self, layer: int, probability: Mapping[int, float]) -> None:
        """Tells the eviction policy what is predicted of the layer's next visit."""
        with self._changed:
            self._policy.expect(layer, probability)

    def wish(self, keys: Iterable[Key]) -> None:
        """Replaces what is to be fetched ahead, the most urgent first. What is not worth more than what it would evict is not."""
        with self._changed:
            self._wishes = [key for key in keys if key not in self._slot]
            # from behind, because the first is taken first
            self._wishes.reverse()
            if self._wishes:
                self._changed.notify_all()

    def set_budget(self, budget: str | int) -> None:
        """Changes the budget at once; experts that are computed with right now leave when they are done.

        Raises:
            ValueError: it does not hold one expert, is more memory than the process may have, or more than was set aside on a GPU.
        """
        if self._has_arena:
            raise ValueError("expert_memory: this engine computes with the node's arena, which holds all experts")
        num_slots = self._slots_for(budget)
        with self._changed:
            if self.pool.device.type == "cpu":
                held_bytes = self._slots.in_use * self.slot_bytes
                check_fits(f"expert_memory: {budget}", num_slots * self.slot_bytes, held_bytes=held_bytes)
            self._slots.set_limit(num_slots)
            self._policy.resized(self._slots.limit)
            self._shrink()
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the reading threads; what they read at the moment is finished. Safe to call again."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    # what is wanted now

    def _demand(self, layer: int, keys: Iterable[Key]) -> None:
        """Pins what there is and lines up what there is not."""
        with self._changed:
            hits = [key for key in keys if key in self._ready]
            late = [key for key in keys if key in self._slot and key not in self._ready]
            missing = [key for key in keys if key not in self._slot]
            for key in keys:
                self._pins[key] = self._pins.get(key, 0) + 1
                self._unused.pop(key, None)
            # where all fit nothing is evicted, and whatever is to go once the budget shrinks was wanted all along
            if (hits or late) and self.num_slots < self.num_experts:
                self._policy.used(layer, [expert for _, expert in (*hits, *late)])
            self._demanded |= dict.fromkeys(missing)
            self._count(hits=len(hits), late=len(late), misses=len(missing))
            if missing and hits:
                self._changed.notify_all()

    def _arrived(self, waiting: dict[Key, None]) -> list[Key]:
        """Those of `waiting` that are in their slots, at least one; meanwhile reads what nobody else does."""
        began_s = None
        try:
            while True:
                with self._changed:
                    while True:
                        if group := [key for key in waiting if key in self._ready]:
                            return group
                        began_s = began_s or time.monotonic()
                        for key in waiting:
                            if key in self._failed:
                                raise self._failed[key]
                        if (job := self._begin_demanded(waiting)) is not None:
                            break
                        self._changed.wait()
                    if self._demanded:
                        self._changed.notify_all()
                self._read(job)
        finally:
            if began_s is not None:
                with self._changed:
                    self._count(stall_s=time.monotonic() - began_s)

    def _release(self, keys: list[Key]) -> None:
        if not keys:
            return
        with self._changed:
            for key in keys:
                self._pins[key] -= 1
                if not self._pins[key]:
                    del self._pins[key]
                    self._demanded.pop(key, None)
                    self._failed.pop(key, None)
            self._shrink()
            # whoever waits for a slot does so for one of these; waking a reader for nothing costs the computation its turn
            if self._demanded or self._wishes:
                self._changed.notify_all()

    # reading

    def _serve(self) -> None:
        while True:
            with self._changed:
                while (job := self._begin_demanded(self._demanded) or self._begin_wished()) is None:
                    if self._is_closed:
                        return
                    self._changed.wait()
            self._read(job)

    def _begin_demanded(self, among: Iterable[Key]) -> _Job | None:
        key = next((key for key in among if key in self._demanded), None)
        if key is None or (slot := self._slot_for(key[0])) is None:
            return None
        del self._demanded[key]
        self._slot[key] = slot
        self._policy.used(key[0], [key[1]])
        return _Job(key, slot, is_wish=False)

    def _begin_wished(self) -> _Job | None:
        while self._wishes and not self._is_closed:
            key = self._wishes.pop()
            if key in self._slot or key in self._demanded:
                continue
            slot = self._slots.take()
            if slot is None:
                victim = self._policy.victim(key[0], self._is_free)
                if victim is None or self._policy.worth(victim) >= self._policy.worth(key):
                    continue
                self._drop(victim)
                slot = self._slots.take()
                if slot is None:
                    continue
            self._slot[key] = slot
            self._unused[key] = 0
            self._policy.fetched(*key)
            self._count(prefetched=1)
            return _Job(key, slot, is_wish=True)
        return None

    def _read(self, job: _Job) -> None:
        key, slot, is_wish = job
        layer, expert = key
        began_s = time.monotonic()
        try:
            with self._order.writing(slot):
                moved_bytes = self._source.read(layer, expert, self.pool[slot, : self._numel[layer]])
        except BaseException as error:
            with self._changed:
                self._drop(key)
                if key in self._pins:
                    self._failed[key] = error
                self._changed.notify_all()
            return
        with self._changed:
            self._ready.add(key)
            if key in self._unused:
                self._unused[key] = moved_bytes
            self._count(fetched_bytes=moved_bytes)
            if not is_wish:
                self._count(demand_reads=1, demand_read_s=time.monotonic() - began_s)
            self._changed.notify_all()

    # slots

    def _slots_for(self, budget: str | int) -> int:
        return slots_for(budget, self.num_experts, self.slot_bytes, self._total_bytes)

    def _slot_for(self, layer: int) -> int | None:
        slot = self._slots.take()
        if slot is None and (victim := self._policy.victim(layer, self._is_free)) is not None:
            self._drop(victim)
            slot = self._slots.take()
        return slot

    def _is_free(self, key: Key) -> bool:
        return key in self._ready and key not in self._pins

    def _drop(self, key: Key) -> None:
        self._slots.give(self._slot.pop(key))
        self._ready.discard(key)
        self._policy.dropped(*key)
        wasted_bytes = self._unused.pop(key, None)
        if wasted_bytes is not None:
            self._count(wasted=1, wasted_bytes=wasted_bytes)

    def _shrink(self) -> None:
        """Evicts down to the limit, as far as nobody computes."""
        while self._slots.in_use > self._slots.limit:
            victim = next((key for key in self._ready if key not in self._pins), None)
            if victim is None:
                return
            self._drop(victim)

    def _count(self, **amounts: float) -> None:
        self._history.count(len(self._ready), **amounts)

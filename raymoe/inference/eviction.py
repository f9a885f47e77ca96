"""Which resident expert gives up its slot when another one is wanted."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

Key = tuple[int, int]
"""(MoE layer, expert)."""


class EvictionPolicy(Protocol):
    """Told what the cache does, and asked for victims. Called under the cache's lock: it must be quick and never block."""

    name: str

    def used(self, layer: int, experts: Iterable[int]) -> None:
        """These experts, resident or on their way, are wanted now."""

    def fetched(self, layer: int, expert: int) -> None:
        """This one takes a slot before anybody wants it."""

    def expect(self, layer: int, probability: Mapping[int, float]) -> None:
        """Replaces what is predicted of the layer's next visit: with what probability experts will be wanted."""

    def dropped(self, layer: int, expert: int) -> None:
        """This expert is no longer resident."""

    def victim(self, layer: int, is_free: Callable[[Key], bool]) -> Key | None:
        """A resident for which `is_free` holds, to make room for an expert of `layer`.

        None while every resident that should go is in use or on its way; asked again once one of them is free, it names one.
        Where all residents are free there is always a victim. It stays the policy's until `dropped` says that it went.
        """

    def worth(self, key: Key) -> float:
        """What it is good for to have an expert in a slot, resident or not; only to be compared."""
        ...

    def resized(self, num_slots: int) -> None:
        """The budget has changed."""


class LeastRecentlyUsed:
    """Least recently used first, among the layers that hold more than their even share of the slots.

    A decode step visits the layers in a cycle, so what was used longest ago over all layers is just what comes next: a plain
    global order misses nearly always as soon as one step needs more experts than there are slots. Slots stay shared: a layer
    keeps more than its share until a layer below its own asks.
    """

    name = "lru"

    def __init__(self, num_layers: int, num_slots: int):
        self._tick = 0
        self._last_use: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(num_layers)]
        self._expected: list[Mapping[int, float]] = [{} for _ in range(num_layers)]
        self.resized(num_slots)

    def resized(self, num_slots: int) -> None:
        num_layers = len(self._last_use)
        self._share = [num_slots // num_layers + (layer < num_slots % num_layers) for layer in range(num_layers)]

    def used(self, layer: int, experts: Iterable[int]) -> None:
        self._tick += 1
        order = self._last_use[layer]
        for expert in experts:
            order[expert] = self._tick
            order.move_to_end(expert)

    def fetched(self, layer: int, expert: int) -> None:
        self.used(layer, [expert])

    def expect(self, layer: int, probability: Mapping[int, float]) -> None:
        self._expected[layer] = probability

    def worth(self, key: Key) -> float:
        layer, expert = key
        return self._expected[layer].get(expert, 0.0)

    def dropped(self, layer: int, expert: int) -> None:
        self._last_use[layer].pop(expert, None)

    def victim(self, layer: int, is_free: Callable[[Key], bool]) -> Key | None:
        if not self._last_use[layer]:
            return self._oldest(range(len(self._last_use)), is_free)
        # the asking layer is about to hold one more; when its own slots are all in use it waits for them, and leaves the others'
        above = [i for i, order in enumerate(self._last_use) if len(order) + (i == layer) > self._share[i]]
        return self._oldest(above or range(len(self._last_use)), is_free)

    def _oldest(self, layers: Iterable[int], is_free: Callable[[Key], bool]) -> Key | None:
        found: Key | None = None
        oldest = self._tick + 1
        for layer in layers:
            for expert, tick in self._last_use[layer].items():
                if tick >= oldest:
                    break
                if is_free((layer, expert)):
                    found, oldest = (layer, expert), tick
                    break
        return found


class GlobalLru:
    """Least recently used of all layers first: the paper's Cache-MoE baseline without its write-back ("shadow-copy LRU")."""

    name = "global_lru"

    def __init__(self, num_layers: int, num_slots: int):
        self._num_layers = num_layers
        self._tick = 0
        self._last_use: OrderedDict[Key, int] = OrderedDict()

    def resized(self, num_slots: int) -> None:
        """Nothing: the order does not depend on the budget."""

    def used(self, layer: int, experts: Iterable[int]) -> None:
        self._tick += 1
        for expert in experts:
            self._last_use[layer, expert] = self._tick
            self._last_use.move_to_end((layer, expert))

    def fetched(self, layer: int, expert: int) -> None:
        self.used(layer, [expert])

    def dropped(self, layer: int, expert: int) -> None:
        self._last_use.pop((layer, expert), None)

    def expect(self, layer: int, probability: Mapping[int, float]) -> None:
        """History alone decides."""

    def victim(self, layer: int, is_free: Callable[[Key], bool]) -> Key | None:
        return next(filter(is_free, self._last_use), None)

    def worth(self, key: Key) -> float:
        """1 for what was used last, falling with every call of `used` since; 0 for what is not resident."""
        last = self._last_use.get(key)
        return 0.0 if last is None else 1 / (1 + (self._tick - last) / self._num_layers)

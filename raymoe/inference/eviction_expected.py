"""Evicts what is expected to be wanted last: Belady's rule with estimates in place of the future."""

from collections.abc import Callable, Iterable, Mapping
from heapq import heapify, heappop, heappush

import numpy as np

from raymoe.inference.eviction import Key

_FAST, _SLOW = 0.3, 0.02
"""How far one visit of a layer moves the two running shares of visits that wanted an expert: what a request is about, and
what the model always likes."""
_FAST_WEIGHT = 0.4
"""Of the fast share in their mean."""
_LEAST = 1e-3
"""Added to every share: what has never been wanted still may be."""
_CHECKS = 8
"""Candidates in use that are looked at again, a call: they may have been let go."""


class ExpectedUse:
    """Evicts the resident whose next use is expected furthest away, in layer visits.

    A step visits the layers in a cycle, so the next visit of each is known; whether it will want an expert is what was
    predicted of it, and where nothing was, and for later visits, a mean of two running shares of visits that did. With q that
    share, p the probability at the next visit, d visits away, of L layers: d + (1 - p) L / q. L. A. Belady, IBM Systems
    Journal 1966, evicts by the true distance.

    What this visit has just been computed with may go as well, so an expert that is expected later than all others takes a slot
    only while it is computed.
    """

    name = "expected_use"

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        *,
        fast: float = _FAST,
        slow: float = _SLOW,
        fast_weight: float = _FAST_WEIGHT,
    ):
        """`fast`, `slow`, `fast_weight`: rates and mean of the running shares, each in (0, 1)."""
        for name, value in (("fast", fast), ("slow", slow), ("fast_weight", fast_weight)):
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name} must be above 0, below 1, got {value}")
        self._num_layers = num_layers
        self._fast_rate, self._slow_rate, self._fast_weight = fast, slow, fast_weight
        self._fast = np.zeros((num_layers, 0))
        self._slow = np.zeros((num_layers, 0))
        # of the slow share, what the visits so far can have made of it
        self._seen = [0.0] * num_layers
        self._slow_weight = [1 - fast_weight] * num_layers
        self._wait = np.zeros((num_layers, 0))
        self._held = np.zeros((num_layers, 0), dtype=bool)
        self._at = num_layers - 1
        self._used_here: set[int] = set()
        self._is_built = False
        self._heap: list[tuple[float, int, int]] = []
        self._passed: list[tuple[float, int, int]] = []
        self._calls = 0
        # residents of each layer, the one to go first last
        self._order: list[list[tuple[float, int]]] = [[] for _ in range(num_layers)]
        self._outdated: set[int] = set()

    def resized(self, num_slots: int) -> None:
        """Nothing: estimates do not depend on the budget."""

    def used(self, layer: int, experts: Iterable[int]) -> None:
        wanted = list(experts)
        self._grow(max(wanted, default=-1))
        if layer != self._at or not self._used_here.isdisjoint(wanted):
            self._visit(layer)
        self._used_here.update(wanted)
        self._outdated.add(layer)
        fast, slow, held, wait = self._fast[layer], self._slow[layer], self._held[layer], self._wait[layer]
        if len(wanted) > 4:
            fast[wanted] += self._fast_rate
            slow[wanted] += self._slow_rate
            held[wanted] = True
            wait[wanted] = self._waits(self._share(layer)[wanted])
        else:
            for expert in wanted:
                fast[expert] = recent = fast.item(expert) + self._fast_rate
                slow[expert] = always = slow.item(expert) + self._slow_rate
                held[expert] = True
                share = self._fast_weight * recent + self._slow_weight[layer] * always + _LEAST
                wait[expert] = max(self._num_layers / share - self._num_layers, 0.0)
        if self._is_built:
            for expert in wanted:
                heappush(self._heap, (-wait.item(expert) - self._num_layers, layer, expert))

    def fetched(self, layer: int, expert: int) -> None:
        self._grow(expert)
        self._held[layer, expert] = True
        self._outdated.add(layer)

    def expect(self, layer: int, probability: Mapping[int, float]) -> None:
        self._grow(max(probability, default=-1))
        expected = np.zeros(self._held.shape[1])
        expected[list(probability)] = list(probability.values())
        self._wait[layer] = (1 - expected) * self._num_layers / self._share(layer)
        self._outdated.add(layer)
        self._is_built = False

    def dropped(self, layer: int, expert: int) -> None:
        self._held[layer, expert] = False

    def victim(self, layer: int, is_free: Callable[[Key], bool]) -> Key | None:
        if not self._is_built:
            self._build()
        self._calls += 1
        if self._calls * _CHECKS > len(self._passed):
            self._calls = 0
            for entry in self._passed:
                heappush(self._heap, entry)
            self._passed.clear()
        found = self._first(is_free)
        if found is None:
            # what was in use, or came since, may be free by now
            self._outdated.update(range(self._num_layers))
            self._build()
            found = self._first(is_free)
        return found

    def worth(self, key: Key) -> float:
        self._grow(key[1])
        return 1.0 / (self._away(key[0]) + self._wait.item(key))

    def _visit(self, layer: int) -> None:
        """The cycle has come to another layer: its shares age by one visit before what it wants is added."""
        self._at, self._is_built = layer, False
        self._used_here.clear()
        self._fast[layer] *= 1 - self._fast_rate
        self._slow[layer] *= 1 - self._slow_rate
        self._seen[layer] += self._slow_rate * (1 - self._seen[layer])
        self._slow_weight[layer] = (1 - self._fast_weight) / self._seen[layer]
        # what was predicted of this visit says nothing of the next
        self._wait[layer] = self._waits(self._share(layer))

    def _share(self, layer: int) -> np.ndarray:
        share = self._fast[layer] * self._fast_weight
        share += self._slow[layer] * self._slow_weight[layer]
        share += _LEAST
        return share

    def _waits(self, share: np.ndarray) -> np.ndarray:
        """Visits from the layer's next one to an expert's next use, where nothing is predicted: (1 - q) L / q."""
        wait = self._num_layers / share
        wait -= self._num_layers
        # the least share that is added to all of them may bring one to above 1
        return np.maximum(wait, 0.0, out=wait)

    def _away(self, layer: int) -> int:
        """Visits until the layer's next one."""
        return (layer - self._at - 1) % self._num_layers + 1

    def _build(self) -> None:
        """Lines up of each layer the resident that is expected last."""
        for layer in self._outdated:
            held = self._held[layer].nonzero()[0]
            wait = self._wait[layer, held]
            order = wait.argsort()
            self._order[layer] = list(zip(wait[order].tolist(), held[order].tolist(), strict=True))
        self._outdated.clear()
        num_layers, at = self._num_layers, self._at + 1
        self._heap = [
            (-order[-1][0] - (layer - at) % num_layers - 1, layer, order[-1][1])
            for layer, order in enumerate(self._order)
            if order
        ]
        heapify(self._heap)
        self._passed.clear()
        self._is_built = True

    def _first(self, is_free: Callable[[Key], bool]) -> Key | None:
        heap, held = self._heap, self._held
        while heap:
            entry = heap[0]
            _, layer, expert = entry
            if held.item(layer, expert):
                if is_free((layer, expert)):
                    # it stays until it is dropped: who asked may find that it is worth more than what would come
                    return layer, expert
                self._passed.append(entry)
                self._outdated.add(layer)
            heappop(heap)
            order = self._order[layer]
            if order and order[-1][1] == expert:
                order.pop()
                if order:
                    heappush(heap, (-order[-1][0] - self._away(layer), layer, order[-1][1]))
        return None

    def _grow(self, expert: int) -> None:
        """Room for experts up to this number: how many a layer has is not told."""
        missing = expert + 1 - self._held.shape[1]
        if missing <= 0:
            return
        pad = ((0, 0), (0, missing))
        self._fast, self._slow, self._wait, self._held = (
            np.pad(each, pad) for each in (self._fast, self._slow, self._wait, self._held)
        )
        for layer in range(self._num_layers):
            self._wait[layer, -missing:] = self._waits(self._share(layer)[-missing:])

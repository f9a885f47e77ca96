"""Evicts what is expected to be wanted last: Belady's rule with estimates in place of the future."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from raymoe.inference.eviction import Key

_FAST, _SLOW = 0.25, 0.02
"""How far one visit of a layer moves the two running shares of visits that wanted an expert: what a request is about, and
what the model always likes."""
_FLOOR = 1e-3
"""Least share: what has never been wanted still may be."""


class ExpectedUse:
    """Evicts the resident whose next use is expected furthest away, in layer visits.

    A step visits the layers in a cycle, so the next visit of each is known; whether it will want an expert is what was
    predicted of it, and where nothing was, and for later visits, the running shares of visits that did. With q the share, p
    the probability at the next visit, d layers away of L: d + (1 - p) L / q. L. A. Belady, IBM Systems Journal 1966, evicts by the
    true distance.
    """

    name = "expected-use"

    def __init__(self, num_layers: int, num_slots: int):
        self._num_layers = num_layers
        self._fast = self._slow = np.zeros((num_layers, 0))
        self._next = np.zeros((num_layers, 0))
        self._held = np.zeros((num_layers, 0), dtype=bool)
        self._at = num_layers - 1
        self._wanted: list[int] = []
        self._queue: list[Key] = []

    def resized(self, num_slots: int) -> None:
        """Nothing: estimates do not depend on the budget."""

    def used(self, layer: int, experts: Iterable[int]) -> None:
        wanted = list(experts)
        self._grow(max(wanted, default=-1))
        if layer != self._at:
            self._visit(layer)
        self._fast[layer, wanted] += _FAST * (1 - self._fast[layer, wanted])
        self._slow[layer, wanted] += _SLOW * (1 - self._slow[layer, wanted])
        self._next[layer, wanted] = self._share(layer)[wanted]
        self._held[layer, wanted] = True

    def fetched(self, layer: int, expert: int) -> None:
        self._grow(expert)
        self._held[layer, expert] = True

    def expect(self, layer: int, probability: Mapping[int, float]) -> None:
        self._grow(max(probability, default=-1))
        self._next[layer] = 0.0
        self._next[layer, list(probability)] = list(probability.values())
        self._queue = []

    def dropped(self, layer: int, expert: int) -> None:
        self._held[layer, expert] = False

    def victim(self, layer: int, is_free: Callable[[Key], bool]) -> Key | None:
        for is_fresh in (False, True):
            if is_fresh:
                self._queue = self._by_distance()
            while self._queue:
                key = self._queue.pop()
                if self._held[key] and is_free(key):
                    return key
        return None

    def worth(self, key: Key) -> float:
        self._grow(key[1])
        return 1.0 / float(self._distance()[key])

    def _visit(self, layer: int) -> None:
        """The cycle has come to another layer: its shares age by one visit before what it wants is added."""
        self._at, self._queue = layer, []
        self._fast[layer] *= 1 - _FAST
        self._slow[layer] *= 1 - _SLOW
        # what was predicted of this visit says nothing of the next
        self._next[layer] = self._share(layer)

    def _share(self, layer: int) -> np.ndarray:
        return np.maximum(self._fast[layer], self._slow[layer])

    def _distance(self) -> np.ndarray:
        """[L, E]: layer visits until the expected next use."""
        away = (np.arange(self._num_layers) - self._at - 1) % self._num_layers + 1
        share = np.maximum(np.maximum(self._fast, self._slow), _FLOOR)
        return away[:, None] + (1 - self._next) * self._num_layers / share

    def _by_distance(self) -> list[Key]:
        """Residents, the one to go first last."""
        layers, experts = np.nonzero(self._held)
        order = np.argsort(self._distance()[layers, experts], kind="stable")
        return list(zip(layers[order].tolist(), experts[order].tolist(), strict=True))

    def _grow(self, expert: int) -> None:
        """Room for experts up to this number: how many a layer has is not told."""
        missing = expert + 1 - self._held.shape[1]
        if missing > 0:
            pad = ((0, 0), (0, missing))
            self._fast, self._slow, self._next, self._held = (
                np.pad(each, pad) for each in (self._fast, self._slow, self._next, self._held)
            )

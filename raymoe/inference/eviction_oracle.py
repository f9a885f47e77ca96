"""Belady's oracle as a policy: what a replay measures the others against."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush

from raymoe.inference.eviction import Key

Trace = Sequence[Sequence[Sequence[int]]]
"""Steps, each a list over layers of the distinct experts that the visit wants."""


class Belady:
    """Evicts the resident whose next use is farthest away. Follows one thread that replays `trace` from its beginning.

    Of several that the same visit uses next, it evicts the one whose use after that is nearest: that visit's misses have to
    be held together, while its hits can go at once, so the hits had better be those that are not needed for long. Close to,
    but not always at, the bound that `raymoe.inference.replay.belady` gives.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5 (1966).
    """

    name = "belady"

    def __init__(self, trace: Trace):
        visits = [[(layer, int(expert)) for expert in group] for step in trace for layer, group in enumerate(step)]
        self._end = len(visits)
        self._visits = visits
        self._position = -1
        self._remaining: set[Key] = set()
        self._uses: dict[Key, list[int]] = {}
        for position in range(len(visits) - 1, -1, -1):
            for key in visits[position]:
                self._uses.setdefault(key, []).append(position)
        self._next: dict[Key, tuple[int, int]] = {}
        self._heap: list[tuple[int, int, Key]] = []
        self._passed: list[tuple[int, int, Key]] = []

    def resized(self, num_slots: int) -> None:
        """Nothing: the future does not depend on the budget."""

    def used(self, layer: int, experts: Iterable[int]) -> None:
        self._arrive()
        for expert in experts:
            key = (layer, int(expert))
            self._remaining.remove(key)
            self._hold(key)

    def fetched(self, layer: int, expert: int) -> None:
        self._hold((layer, expert))

    def dropped(self, layer: int, expert: int) -> None:
        self._next.pop((layer, expert), None)

    def expect(self, layer: int, probability: Mapping[int, float]) -> None:
        """The future is known."""

    def victim(self, layer: int, is_free: Callable[[Key], bool]) -> Key | None:
        self._arrive()
        heap = self._heap
        while heap:
            next_use, second_use, key = heap[0]
            if self._next.get(key) != (-next_use, second_use):
                heappop(heap)
            elif is_free(key):
                return key
            else:
                # in use: looked at again at the next visit, or when there is nothing else
                self._passed.append(heappop(heap))
        self._restore()
        return None

    def worth(self, key: Key) -> float:
        return 1 / (1 + self._next_uses(key)[0] - self._position)

    def _arrive(self) -> None:
        """Goes on to the next visit that wants anything once all of this one has been used."""
        while not self._remaining and self._position + 1 < self._end:
            self._position += 1
            self._remaining = set(self._visits[self._position])
            self._restore()

    def _restore(self) -> None:
        if len(self._passed) > len(self._heap):
            self._heap += self._passed
            heapify(self._heap)
        else:
            for entry in self._passed:
                heappush(self._heap, entry)
        self._passed.clear()

    def _hold(self, key: Key) -> None:
        uses = self._next_uses(key)
        if self._next.get(key) != uses:
            self._next[key] = uses
            heappush(self._heap, (-uses[0], uses[1], key))

    def _next_uses(self, key: Key) -> tuple[int, int]:
        """Positions of the first two uses after this visit, or at it where that is still to come."""
        uses = self._uses.get(key, [])
        while uses and (uses[-1] < self._position or (uses[-1] == self._position and key not in self._remaining)):
            uses.pop()
        return uses[-1] if uses else self._end, uses[-2] if len(uses) > 1 else self._end

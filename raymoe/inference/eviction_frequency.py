"""Eviction by frequency, and by predicted demand as in ExpertFlow."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush

from raymoe.inference.eviction import Key

_LARGEST_WEIGHT = 1e100


class LeastFrequentlyUsed:
    """Fewest uses first, of all layers, where a use `s` steps ago counts `decay**s`; of equals the one used longest ago."""

    name = "lfu"

    def __init__(self, num_layers: int, num_slots: int, *, decay: float = 0.95):
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be above 0, up to 1, got {decay!r}")
        self._decay = decay
        self._layer = -1
        self._tick = 0
        # later uses weigh more, so that what was counted before never has to be touched
        self._weight = 1.0
        self._count: dict[Key, float] = {}
        self._entry: dict[Key, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, Key]] = []

    def resized(self, num_slots: int) -> None:
        """Nothing: uses do not depend on the budget."""

    def used(self, layer: int, experts: Iterable[int]) -> None:
        if layer < self._layer:
            self._weight /= self._decay
            if self._weight > _LARGEST_WEIGHT:
                self._rescale()
        self._layer = layer
        for expert in experts:
            self._count[layer, expert] = self._count.get((layer, expert), 0.0) + self._weight
            self._hold((layer, expert))

    def fetched(self, layer: int, expert: int) -> None:
        self._hold((layer, expert))

    def dropped(self, layer: int, expert: int) -> None:
        self._entry.pop((layer, expert), None)

    def expect(self, layer: int, probability: Mapping[int, float]) -> None:
        """History alone decides."""

    def victim(self, layer: int, is_free: Callable[[Key], bool]) -> Key | None:
        passed, found = [], None
        while self._heap:
            count, tick, key = self._heap[0]
            if self._entry.get(key) != (count, tick):
                heappop(self._heap)
            elif is_free(key):
                found = key
                break
            else:
                passed.append(heappop(self._heap))
        for entry in passed:
            heappush(self._heap, entry)
        return found

    def worth(self, key: Key) -> float:
        """Uses a step, as decayed."""
        return min(1.0, self._count.get(key, 0.0) / self._weight * (1 - self._decay))

    def _hold(self, key: Key) -> None:
        self._tick += 1
        self._entry[key] = (self._count.get(key, 0.0), self._tick)
        heappush(self._heap, (*self._entry[key], key))
        # most entries are outdated once there are several a resident
        if len(self._heap) > 8 * len(self._entry) + 64:
            self._rebuild()

    def _rescale(self) -> None:
        self._count = {key: count / self._weight for key, count in self._count.items()}
        self._entry = {key: (count / self._weight, tick) for key, (count, tick) in self._entry.items()}
        self._weight = 1.0
        self._rebuild()

    def _rebuild(self) -> None:
        self._heap = [(*entry, key) for key, entry in self._entry.items()]
        heapify(self._heap)


class Plec:
    """Slots in proportion to the layers' predicted demand; victims outside the predicted sets, of layers just passed, first.

    Where nothing is predicted of a layer, what it wanted last stands for it. Within a layer the least recently used goes.

    Source: ExpertFlow (arXiv 2410.17954), the predictive locality-aware expert cache (PLEC).
    """

    name = "plec"

    def __init__(self, num_layers: int, num_slots: int):
        self._num_slots = num_slots
        self._layer = num_layers - 1
        self._resident: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_layers)]
        self._demand: list[dict[int, float]] = [{} for _ in range(num_layers)]
        self._is_predicted = [False] * num_layers
        self._shares: list[int] | None = None
        self._order: tuple[int, Iterator[Key]] | None = None
        self._candidate: Key | None = None

    def resized(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._shares = None

    def used(self, layer: int, experts: Iterable[int]) -> None:
        wanted = dict.fromkeys(experts, 1.0)
        for expert in wanted:
            self._resident[layer][expert] = None
            self._resident[layer].move_to_end(expert)
        if layer == self._layer and not self._is_predicted[layer] and wanted.keys().isdisjoint(self._demand[layer]):
            # more of the same visit: what is to go stays the same
            self._demand[layer].update(wanted)
            return
        self._layer = layer
        self._demand[layer] = wanted
        self._is_predicted[layer] = False
        self._shares = self._order = None

    def fetched(self, layer: int, expert: int) -> None:
        self._resident[layer][expert] = None

    def dropped(self, layer: int, expert: int) -> None:
        self._resident[layer].pop(expert, None)

    def expect(self, layer: int, probability: Mapping[int, float]) -> None:
        self._demand[layer] = {expert: share for expert, share in probability.items() if share > 0}
        self._is_predicted[layer] = True
        self._shares = self._order = None

    def victim(self, layer: int, is_free: Callable[[Key], bool]) -> Key | None:
        for _ in range(2):
            if self._order is None or self._order[0] != layer:
                self._order = layer, self._candidates(layer)
                self._candidate = None
            while True:
                key = self._candidate
                if key is not None and key[1] in self._resident[key[0]] and is_free(key):
                    return key
                self._candidate = next(self._order[1], None)
                if self._candidate is None:
                    # what was in use when it was passed may be free by now
                    self._order = None
                    break
        return None

    def _candidates(self, layer: int) -> Iterator[Key]:
        """Residents in the order in which they are to go, as far as they still are when their turn comes."""
        num_layers = len(self._resident)
        if self._shares is None:
            self._shares = self._divide()
        shares = self._shares
        # the layer that will be visited last comes first: this one, then the one before it
        order = [(layer - back) % num_layers for back in range(num_layers)]
        for is_spared, is_above in ((True, True), (True, False), (False, True), (False, False)):
            for i in order:
                resident = self._resident[i]
                for expert in list(resident):
                    if is_above and len(resident) + (i == layer) <= shares[i]:
                        break
                    if expert in resident and not (is_spared and expert in self._demand[i]):
                        yield i, expert

    def worth(self, key: Key) -> float:
        """The predicted probability."""
        return self._demand[key[0]].get(key[1], 0.0)

    def _divide(self) -> list[int]:
        """Slots of each layer: in proportion to the sizes of the predicted sets, the largest remainders rounded up."""
        sizes = [len(demand) for demand in self._demand]
        total = sum(sizes) or 1
        shares = [self._num_slots * size // total for size in sizes]
        rest = sorted(range(len(sizes)), key=lambda i: (-(self._num_slots * sizes[i] % total), i))
        for i in rest[: self._num_slots - sum(shares)]:
            shares[i] += 1
        return shares

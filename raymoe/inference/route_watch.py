"""Which experts the tokens of a request ran through, and where each came from: for the requests that ask.

T rows of a step, K choices a row, M main experts of a row under compression.
"""

from collections.abc import Sequence

from torch import Tensor

from raymoe.inference.cache import ExpertCache
from raymoe.inference.requests import RouteOutcome, TokenRoute


class RouteWatch:
    """Follows the row that a request's next token comes from through the layers. Steps on the generation thread; requests come and
    go from any."""

    def __init__(self, cache: ExpertCache, num_layers: int):
        self._cache = cache
        self._num_layers = num_layers
        self._asking: set[str] = set()
        self._row_of: dict[str, int] = {}
        self._missing: set[int] = set()
        self._stood_in: dict[int, list[int]] = {}
        self._layers: dict[str, list[list[tuple[int, RouteOutcome]]]] = {}

    def add(self, request_id: str) -> None:
        self._asking.add(request_id)

    def forget(self, request_id: str) -> None:
        self._asking.discard(request_id)

    def step_begins(self, rows: Sequence[str]) -> None:
        """`rows`: whose row each is. Of a prompt's several rows the last one gives the token."""
        self._row_of = {}
        if self._asking:
            self._row_of = {request_id: row for row, request_id in enumerate(rows) if request_id in self._asking}
        self._layers = {request_id: [[] for _ in range(self._num_layers)] for request_id in self._row_of}

    def before(self, layer: int, wanted: list[int]) -> None:
        """A layer is about to ask the cache for its experts: what is not there now has to be waited for."""
        if self._row_of:
            self._missing = set(self._cache.unready(layer, wanted))

    def stands_in(self, main_index: Tensor, is_gone: Tensor) -> None:
        """Vectors act for experts [T, M] where bool [T, M] says so; comes before the layer's `routed`."""
        for row in self._row_of.values():
            self._stood_in[row] = main_index[row][is_gone[row]].tolist()

    def routed(self, layer: int, expert_index: Tensor, num_experts: int) -> None:
        """A layer's choices: int64 [T, K], num_experts where there is none."""
        for request_id, row in self._row_of.items():
            told = self._layers[request_id][layer]
            for expert in expert_index[row].tolist():
                if expert < num_experts:
                    told.append((expert, "fetched" if expert in self._missing else "hit"))
            told += [(expert, "stood_in") for expert in self._stood_in.pop(row, ())]

    def route(self, request_id: str, token: int) -> TokenRoute | None:
        """Of the token that this step gave a request; None: it did not ask."""
        layers = self._layers.get(request_id)
        return None if layers is None else TokenRoute(token, layers)

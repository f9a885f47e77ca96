"""Where the experts of a request's next token are known from: what the token scheduler asks, and the simplest answer to it.

L MoE layers, E experts a layer (of the layer with the most), K choices a token.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Paths = NDArray[np.bool_]
"""bool [R, L, E]: the experts of each request; all False where nothing is known."""


class Routes(Protocol):
    """Called on the generation thread before a step is put together; must be quick and never block."""

    def paths(self, request_ids: list[str]) -> Paths:
        """The experts that the next token of each request is expected to want."""
        ...

    def taken(self, request_ids: list[str]) -> Paths:
        """The experts that the last token of each request did use: what predictions are judged by."""
        ...

    def residents(self) -> NDArray[np.bool_]:
        """bool [L, E]: the experts that need no fetching."""
        ...


class LastPaths:
    """`Routes` that expect of a request's next token what its last ones used: nothing is trained, and it costs little.

    Neighbouring tokens share about twice as many experts as chance would have it (arXiv 2505.16056). The very last token
    alone would mislead where the cache holds more than a step uses: what just ran would always seem to be resident.
    Holds `capacity` requests, about 5 * capacity * L * (E + 1) bytes; a new one takes the place of the one that came first.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        residents: Callable[[], NDArray[np.bool_]],
        capacity: int = 512,
        decay: float = 0.875,
        share: float = 0.2,
    ):
        """Allocates the ring.

        Args:
            residents: gives bool [L, E] of what is resident now.
            capacity: more than are served at once; of a request that lost its place nothing is known until it runs again.
            decay: weight of a token beside the next one's, in [0, 1); 0: the last token alone.
            share: an expert is expected if it was used in that share of the tokens, in (0, 1].

        Raises:
            ValueError: a value out of range; names it.
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be from 0 to below 1, got {decay}")
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be above 0, up to 1, got {share}")
        # one column more than there are experts: an index equal to E means "no expert here"
        self._used = np.zeros((capacity, num_layers, num_experts + 1), dtype=bool)
        self._count = np.zeros(self._used.shape, dtype=np.float32)
        self._tokens = np.zeros((capacity, num_layers, 1), dtype=np.float32)
        self._decay = decay
        self._share = share
        self._residents = residents
        self._slot: dict[str, int] = {}
        self._owner: list[str | None] = [None] * capacity
        self._next = 0
        self._rows: tuple[Sequence[str], NDArray[np.intp], NDArray[np.intp]] | None = None

    def saw(self, layer: int, request_ids_of_rows: Sequence[str], expert_index: NDArray[np.integer]) -> None:
        """A layer's router has decided. Of a request with several rows (a prompt) the last one is kept.

        Args:
            layer: 0-based, among the MoE layers.
            request_ids_of_rows: whose row each of the first rows is; further rows are padding. Pass the same object at every
                layer of a step: it is looked at once.
            expert_index: [T, K], E for "no expert".

        Raises:
            ValueError: more ids than rows.
        """
        if len(request_ids_of_rows) > len(expert_index):
            raise ValueError(
                f"expert_index has {len(expert_index)} rows, but {len(request_ids_of_rows)} rows have a request"
            )
        if self._rows is None or self._rows[0] is not request_ids_of_rows:
            last = {request_id: row for row, request_id in enumerate(request_ids_of_rows)}
            slots = np.array([self._claim(request_id) for request_id in last], dtype=np.intp)
            self._rows = request_ids_of_rows, slots, np.array(list(last.values()), dtype=np.intp)
        _, slots, rows = self._rows
        chosen = slots[:, None], layer, expert_index[rows]
        self._used[slots, layer] = False
        self._used[chosen] = True
        self._count[slots, layer] *= self._decay
        self._count[chosen] += 1.0
        self._tokens[slots, layer] = self._tokens[slots, layer] * self._decay + 1.0

    def paths(self, request_ids: list[str]) -> Paths:
        slots = self._slots(request_ids)
        # a layer that was not seen yet has no tokens, and nothing is expected of it
        least = self._share * np.maximum(self._tokens[slots], 1.0)
        expected = self._count[slots, :, :-1] >= least
        expected[slots < 0] = False
        return expected

    def taken(self, request_ids: list[str]) -> Paths:
        slots = self._slots(request_ids)
        used = self._used[slots, :, :-1]
        used[slots < 0] = False
        return used

    def residents(self) -> NDArray[np.bool_]:
        return self._residents()

    def _slots(self, request_ids: list[str]) -> NDArray[np.intp]:
        return np.array([self._slot.get(request_id, -1) for request_id in request_ids], dtype=np.intp)

    def _claim(self, request_id: str) -> int:
        slot = self._slot.get(request_id)
        if slot is not None:
            return slot
        slot, self._next = self._next, (self._next + 1) % len(self._owner)
        owner = self._owner[slot]
        if owner is not None:
            del self._slot[owner]
        self._owner[slot] = request_id
        self._slot[request_id] = slot
        self._used[slot] = False
        self._count[slot] = self._tokens[slot] = 0.0
        return slot

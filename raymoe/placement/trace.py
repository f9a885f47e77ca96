"""Routing counts as planning takes them. S = steps, R = ranks, L = MoE layers, E = experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class LoadTrace:
    """How many rows each rank's gate gave each expert, step by step.

    Raises:
        ValueError: not integers [S, R, L, E], an axis of length 0, or a negative count; names the place.
    """

    rows: np.ndarray
    """int64 [S, R, L, E]."""

    name: str = "trace"

    choices: int = 1
    """K: experts a token took, as far as the trace says."""

    def __post_init__(self) -> None:
        rows = np.asarray(self.rows)
        if rows.ndim != 4 or rows.size == 0 or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(
                f"a trace is integers [steps, ranks, layers, experts], got {rows.dtype} {list(rows.shape)}"
            )
        if rows.min() < 0:
            place = [int(i) for i in np.argwhere(rows < 0)[0]]
            raise ValueError(f"rows{place} = {rows[tuple(place)]}: counts must not be negative")
        object.__setattr__(self, "rows", rows.astype(np.int64, copy=False))

    @classmethod
    def of_columns(cls, columns: dict[str, np.ndarray], *, name: str = "trace", choices: int = 1) -> LoadTrace:
        """The trace that a table with a row a (step, layer, rank) holds; steps, layers and ranks may come in any order.

        Args:
            columns: integers ``step`` [N], ``layer`` [N], ``rank`` [N] and ``counts`` [N, E].

        Raises:
            ValueError: a (step, layer, rank) that is missing or comes twice; names it.
        """
        keys = [np.unique(columns[field], return_inverse=True) for field in ("step", "rank", "layer")]
        sizes = tuple(len(values) for values, _ in keys)
        flat = np.ravel_multi_index([index.ravel() for _, index in keys], sizes)
        seen = np.bincount(flat, minlength=int(np.prod(sizes)))
        if (seen != 1).any():
            at = int(np.flatnonzero(seen != 1)[0])
            step, rank, layer = (
                int(values[i]) for (values, _), i in zip(keys, np.unravel_index(at, sizes), strict=True)
            )
            raise ValueError(
                f"step {step}, layer {layer}, rank {rank} comes {seen[at]} times; every one must come once"
            )
        rows = np.empty((flat.size, columns["counts"].shape[1]), dtype=np.int64)
        rows[flat] = columns["counts"]
        return cls(rows.reshape(*sizes, -1), name, choices)

    @property
    def num_steps(self) -> int:
        return self.rows.shape[0]

    @property
    def num_ranks(self) -> int:
        return self.rows.shape[1]

    @property
    def num_layers(self) -> int:
        return self.rows.shape[2]

    @property
    def num_experts(self) -> int:
        return self.rows.shape[3]

    @property
    def tokens_per_rank(self) -> int:
        """Tokens that a rank takes through a layer, on average."""
        return round(self.rows.sum() / (self.num_steps * self.num_ranks * self.num_layers * self.choices))

    def for_ranks(self, num_ranks: int) -> LoadTrace:
        """The same routing seen from another number of ranks: each rank's rows in equal parts, or whole ranks put
        together. Which part of a rank takes an odd row goes round with the expert.

        Raises:
            ValueError: neither number divides the other.
        """
        have = self.num_ranks
        if num_ranks == have:
            return self
        if num_ranks % have == 0:
            parts = num_ranks // have
            each, odd = np.divmod(self.rows[:, :, None], parts)
            turn = (np.arange(parts)[:, None, None] + np.arange(self.num_experts)) % parts
            rows = (each + (turn < odd)).reshape(self.num_steps, num_ranks, self.num_layers, self.num_experts)
        elif have % num_ranks == 0:
            rows = self.rows.reshape(self.num_steps, num_ranks, have // num_ranks, *self.rows.shape[2:]).sum(axis=2)
        else:
            raise ValueError(
                f"{self.name} has {have} ranks, which cannot be split over {num_ranks}: one must divide the other"
            )
        return replace(self, rows=rows)

    def steps(self, chosen: slice) -> LoadTrace:
        """Some of the steps."""
        return replace(self, rows=self.rows[chosen])

"""What every transport of the sparse collectives is, and what they share."""

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from torch import Tensor

from raymoe.training.sparse.moves import Moves
from raymoe.training.sparse.pending import Pending
from raymoe.training.world import World

Rows = Mapping[int, Tensor]
"""Expert -> its flat row on this rank, 1-D and contiguous; all rows of one length and dtype, on all ranks."""

Kind = Literal["sparse_all_gather", "sparse_reduce_scatter"]
"""Under which name bytes are counted."""


class Transport(Protocol):
    """One way to carry out `Moves`; every rank uses the same one.

    All ranks call `gather` and `reduce` in the same program order, whether they have rows in the matter or not, and wait in
    the same order; transfers of different rows may be under way together. No copies at all: no communication.

    Raises:
        ValueError: `rows` lacks an expert that this rank sends or receives.
    """

    @property
    def name(self) -> str: ...

    def gather(self, moves: Moves, rows: Rows, world: World) -> Pending:
        """Starts to overwrite every copy's row with its owner's."""
        ...

    def reduce(self, moves: Moves, rows: Rows, world: World) -> Pending:
        """Starts to add every copy's row to its owner's. A copy's row is spent afterwards: it may hold a part of the sum."""
        ...


def check_rows(moves: Moves, rows: Rows) -> None:
    """ValueError if a row of this rank is missing."""
    missing = _first_missing(moves.sent, rows), _first_missing(moves.received, rows)
    for expert, role in zip(missing, ("owns", "holds a copy of"), strict=True):
        if expert is not None:
            raise ValueError(f"rows lacks expert {expert}, which rank {moves.rank} {role}; it has {sorted(rows)}")


def _first_missing(experts: Iterable[int], rows: Rows) -> int | None:
    return next((expert for expert in experts if expert not in rows), None)

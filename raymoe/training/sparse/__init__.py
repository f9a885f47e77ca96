"""Sparse collectives: this step's copies of experts go out, their gradients come home.

`Transport.gather` sends chosen experts from their owners to chosen ranks; `Transport.reduce` is its adjoint, the sum of all
copies' gradients at the owner. Transports differ in the ways that rows take and never in what arrives, except that
`hierarchical` sums each node first, so its last bits may differ.
"""

from raymoe.training.sparse.all_to_all import AllToAll
from raymoe.training.sparse.moves import Moves
from raymoe.training.sparse.pending import Pending
from raymoe.training.sparse.point_to_point import HIERARCHICAL, P2P, PointToPoint, warm_up
from raymoe.training.sparse.transport import Rows, Transport

__all__ = [
    "TRANSPORTS",
    "AllToAll",
    "Moves",
    "Pending",
    "PointToPoint",
    "Rows",
    "Transport",
    "transport",
    "warm_up",
]

TRANSPORTS: dict[str, Transport] = {each.name: each for each in (P2P, AllToAll(), HIERARCHICAL)}


def transport(name: str) -> Transport:
    """
    Raises:
        ValueError: there is no transport of that name.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"there is no transport '{name}'; there are {', '.join(TRANSPORTS)}")
    return TRANSPORTS[name]

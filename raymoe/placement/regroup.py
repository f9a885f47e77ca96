"""What a change of members asks of placement: who keeps whose snapshot, and who owns what afterwards.

L = MoE layers, E = experts a layer, D = ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raymoe.placement.sharding import check_owners


def buddies(nodes: Sequence[int]) -> list[int | None]:
    """The rank that keeps each rank's snapshot beside its own: on another node if there is one; None if it is alone.

    Args:
        nodes: node of every rank, [D].
    """
    by_node = sorted(range(len(nodes)), key=lambda rank: (nodes[rank], rank))
    sizes = {node: list(nodes).count(node) for node in nodes}
    largest = max(sizes, key=lambda node: (sizes[node], -node), default=0)
    found: list[int | None] = [None] * len(nodes)
    if len(sizes) > 1 and 2 * sizes[largest] > len(nodes):
        inside = [rank for rank in by_node if nodes[rank] == largest]
        outside = [rank for rank in by_node if nodes[rank] != largest]
        for place, rank in enumerate(inside):
            found[rank] = outside[place % len(outside)]
        for rank, buddy in zip(outside, inside, strict=False):
            found[rank] = buddy
        return found
    # as far on as the largest node is long: never on the same one, and every rank keeps one
    ahead = sizes[largest] if len(sizes) > 1 else 1
    for place, rank in enumerate(by_node):
        buddy = by_node[(place + ahead) % len(nodes)]
        found[rank] = None if buddy == rank else buddy
    return found


def owners_after(owners: np.ndarray, survivors: Sequence[int | None]) -> np.ndarray:
    """Owners among the ranks of a new epoch, with the fewest experts moved that an even split allows.

    Every rank owns as many experts over all layers as the next, or one more. Experts that have to move go to ranks that own
    least of their layer; a rank that owns too many gives up those of the layers it owns most of. Ties go to the lower index.

    Args:
        owners: int64 [L, E], old ranks.
        survivors: for each new rank the old one it was, or None if it has just joined.

    Returns:
        int64 [L, E], new ranks.

    Raises:
        ValueError: `survivors` names no rank, or an old one twice.
    """
    size = len(survivors)
    if not size:
        raise ValueError("survivors names no rank; an epoch has one at least")
    old = [rank for rank in survivors if rank is not None]
    if len(set(old)) < len(old):
        raise ValueError(f"survivors = {list(survivors)} names an old rank twice")
    owners = check_owners(owners, int(np.max(owners, initial=0)) + 1)
    after = np.full(owners.shape, -1, dtype=np.int64)
    for new, rank in enumerate(survivors):
        if rank is not None:
            after[owners == rank] = new
    held_D = np.array([(after == new).sum() for new in range(size)])
    each, odd = divmod(owners.size, size)
    share_D = np.full(size, each)
    share_D[np.argsort(-held_D, kind="stable")[:odd]] += 1
    counts_LD = np.array([[(row == new).sum() for new in range(size)] for row in after])
    for new in range(size):
        for _ in range(held_D[new] - share_D[new]):
            # of the layers that it owns most of the one that the others have given up least of
            layer = min(range(len(after)), key=lambda each: (-counts_LD[each, new], (after[each] < 0).sum(), each))
            after[layer, np.flatnonzero(after[layer] == new)[-1]] = -1
            counts_LD[layer, new] -= 1
    free_D = share_D - counts_LD.sum(axis=0)
    for layer, expert in np.argwhere(after < 0).tolist():
        new = min(np.flatnonzero(free_D).tolist(), key=lambda rank: (counts_LD[layer, rank], -free_D[rank], rank))
        after[layer, expert] = new
        counts_LD[layer, new] += 1
        free_D[new] -= 1
    return after

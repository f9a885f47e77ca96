"""Which host holds which experts while a model is served. D hosts, L MoE layers, E experts of the layer with the most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raymoe.placement.regroup import owners_after
from raymoe.placement.sharding import even_owners

Key = tuple[int, int]


def host_owners(present: np.ndarray | None, survivors: Sequence[int | None], num_experts: Sequence[int]) -> np.ndarray:
    """Owners among the hosts that there are now: an even share each, with the fewest experts moved.

    Args:
        present: int64 [L, E], owners among the hosts before; None: there were none.
        survivors: for each host now the one before that it was, or None if it has just joined.
        num_experts: of each MoE layer.

    Returns:
        int64 [L, E], hosts in [0, D); what stands at experts that a layer does not have is of no meaning.
    """
    if present is None or all(before is None for before in survivors):
        return even_owners(len(num_experts), max(num_experts), len(survivors))
    return owners_after(present, survivors)


def holdings(
    owners: np.ndarray, capacity: Sequence[int], heat: np.ndarray, num_experts: Sequence[int]
) -> list[list[Key]]:
    """What each host is to hold, hottest first.

    A host holds what it owns, as far as it has room, the hottest first. Rooms that are left take in what found none, and then
    copies, the hottest experts first and one more copy of each expert at a time, so that a host that dies takes little with it
    and hot experts can be asked of several.

    Args:
        owners: int64 [L, E], as from `host_owners`.
        capacity: experts that each host has room for, [D].
        heat: [L, E], not negative, how much each expert is asked for, in any one unit. Ties go to the lower index.
        num_experts: of each MoE layer.
    """
    by_heat = np.argsort(-heat.ravel(), kind="stable").tolist()
    keys = [divmod(flat, heat.shape[1]) for flat in by_heat]
    keys = [(layer, expert) for layer, expert in keys if expert < num_experts[layer]]
    held: list[dict[Key, None]] = [{} for _ in capacity]
    homeless = []
    for key in keys:
        owner = int(owners[key])
        if len(held[owner]) < capacity[owner]:
            held[owner][key] = None
        else:
            homeless.append(key)
    rank = {key: place for place, key in enumerate(keys)}
    for wanted in [homeless, *[keys] * (len(capacity) - 1)]:
        for key in wanted:
            rooms = [d for d in range(len(capacity)) if len(held[d]) < capacity[d]]
            if not rooms:
                break
            others = [d for d in rooms if key not in held[d]]
            if others:
                held[max(others, key=lambda d: (capacity[d] - len(held[d]), -d))][key] = None
    return [sorted(each, key=rank.__getitem__) for each in held]

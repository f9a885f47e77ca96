"""Who owns which expert. L = MoE layers, E = experts a layer, D = ranks."""

from __future__ import annotations

import numpy as np

from raymoe.placement.cluster import ClusterSpec


def even_owners(num_layers: int, num_experts: int, num_devices: int) -> np.ndarray:
    """The split that plain expert parallelism uses: contiguous runs of experts, as equal as E and D allow.

    Expert e belongs to rank ``e * D // E``. With E < D some ranks own nothing in a layer.

    Returns:
        owners, int64 [L, E], ranks in [0, D).

    Raises:
        ValueError: a count below 1.
    """
    for name, count in (("num_layers", num_layers), ("num_experts", num_experts), ("num_devices", num_devices)):
        if count < 1:
            raise ValueError(f"{name} = {count}: must be at least 1")
    owners_E = np.arange(num_experts, dtype=np.int64) * num_devices // num_experts
    return np.tile(owners_E, (num_layers, 1))


def check_owners(owners: np.ndarray, num_devices: int) -> np.ndarray:
    """Checks that every expert has exactly one owner among the ranks; any split is allowed, even or not.

    Args:
        owners: integers, [L, E] or [E].

    Returns:
        The same owners as int64.

    Raises:
        ValueError: wrong shape or dtype, or a rank outside [0, num_devices), with the place of the first one.
    """
    owners = np.asarray(owners)
    if owners.ndim not in (1, 2) or owners.size == 0 or not np.issubdtype(owners.dtype, np.integer):
        raise ValueError(f"owners must be integers [L, E] or [E], got {owners.dtype} {owners.shape}")
    if owners.min() < 0 or owners.max() >= num_devices:
        place = tuple(int(i) for i in np.argwhere((owners < 0) | (owners >= num_devices))[0])
        raise ValueError(
            f"owners{list(place)} = {owners[place]}, but the ranks are 0..{num_devices - 1}; "
            "owners of another epoch must be re-sharded first"
        )
    return owners.astype(np.int64, copy=False)


def heterogeneous_owners(
    loads: np.ndarray, num_copied: np.ndarray, cluster: ClusterSpec, present: np.ndarray | None = None
) -> np.ndarray:
    """Owners of all layers together such that the experts that are not copied anyway burden nodes and devices evenly.

    Each rank owns equally many experts over all layers, not in each: memory is a matter of the whole model.

    Args:
        loads: int64 [L, E], expected load, any one unit.
        num_copied: int64 [L], how many of each layer's hottest experts will be copied everywhere, t of that layer.
        present: int64 [L, E], present owners: experts that may go anywhere stay where they are if there is room.

    Returns:
        owners, int64 [L, E]; the first ranks own one expert more if the ranks do not divide the experts.

    Source: Algorithm 2 of arXiv 2502.02581. Where the paper is silent: loads are counted per layer, ranks without a free
    slot are passed over, ties go to the lower index, and copied experts fill up the emptiest ranks, staying first.
    """
    num_layers, num_experts = loads.shape
    num_devices = cluster.num_devices
    order_LE = np.argsort(-loads, axis=1, kind="stable")
    each, odd = divmod(num_layers * num_experts, num_devices)
    free_D = each + (np.arange(num_devices) < odd)
    owners = np.full(loads.shape, -1, dtype=np.int64)
    coldest_L = [order_LE[layer, int(num_copied[layer]) :] for layer in range(num_layers)]
    heaviest_L = [int(loads[layer, rest[0]]) if rest.size else -1 for layer, rest in enumerate(coldest_L)]
    for layer in sorted(range(num_layers), key=lambda index: (-heaviest_L[index], index)):
        load_D = np.zeros(num_devices, dtype=np.int64)
        for expert in coldest_L[layer].tolist():
            rank = _least_loaded(load_D, free_D, cluster)
            owners[layer, expert] = rank
            load_D[rank] += loads[layer, expert]
            free_D[rank] -= 1
    anywhere = np.argwhere(owners < 0).tolist()
    if present is not None:
        for layer, expert in anywhere:
            rank = present[layer, expert]
            if free_D[rank] > 0:
                owners[layer, expert] = rank
                free_D[rank] -= 1
    for layer, expert in anywhere:
        if owners[layer, expert] < 0:
            rank = int(np.argmax(free_D))
            owners[layer, expert] = rank
            free_D[rank] -= 1
    return owners


def _least_loaded(load_D: np.ndarray, free_D: np.ndarray, cluster: ClusterSpec) -> int:
    """The least loaded node that has room, and on it the least loaded rank; ties: fewer free slots, then the index."""
    nodes = cluster.nodes
    open_D = np.flatnonzero(free_D > 0)
    node_load_N, node_free_N = cluster.members @ load_D, cluster.members @ free_D
    node_D = nodes[open_D]
    keys = (open_D, free_D[open_D], load_D[open_D], node_D, node_free_N[node_D], node_load_N[node_D])
    return int(open_D[np.lexsort(keys)[0]])

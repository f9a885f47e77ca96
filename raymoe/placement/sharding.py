"""Who owns which expert. L = MoE layers, E = experts a layer, D = ranks."""

from __future__ import annotations

import numpy as np


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

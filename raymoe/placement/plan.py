"""What planning takes and gives. L = MoE layers, E = experts a layer, D = ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.loads import DEFAULT_WINDOW
from raymoe.placement.sharding import check_owners

Layout = Literal["whole", "sliced"]
Dispatch = Literal["local", "even", "capacity"]
Timing = Literal["hidden", "blocking"]


def owned(owners: np.ndarray, num_devices: int) -> np.ndarray:
    """The base placement: every expert with its owner only. owners [..., E] -> uint8 [..., E, D]."""
    return (np.asarray(owners)[..., None] == np.arange(num_devices)).astype(np.uint8)


def _read_only(array: np.ndarray) -> np.ndarray:
    """The array itself if nobody can write to it, else a copy: a plan must not change under a rank's feet."""
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


def _checked(owners: np.ndarray, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owners and copies, read-only, or a ValueError that says which invariant they break."""
    owners, copies = np.asarray(owners), np.asarray(copies)
    if copies.ndim < 2 or copies.shape[:-1] != owners.shape or copies.dtype != np.uint8:
        raise ValueError(
            f"copies must be uint8 {[*owners.shape, 'D']} to go with owners {list(owners.shape)}, "
            f"got {copies.dtype} {list(copies.shape)}"
        )
    owners = check_owners(owners, copies.shape[-1])
    if copies.max() > 1:
        raise ValueError(f"copies holds {copies.max()}; it says 1 where an expert is and 0 where it is not")
    holds = np.take_along_axis(copies, owners[..., None], axis=-1)[..., 0]
    if not holds.all():
        place = tuple(int(i) for i in np.argwhere(holds == 0)[0])
        raise ValueError(
            f"copies{list(place)} leaves out rank {owners[place]}, the owner, which always holds its expert"
        )
    return _read_only(owners), _read_only(copies)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer's placement in one step.

    Raises:
        ValueError: an owner that is not a rank, or copies that leave an owner out.
    """

    owners: np.ndarray
    """int64 [E]: the rank that keeps the expert's parameters and optimizer state."""

    copies: np.ndarray
    """uint8 [E, D]: 1 where the expert's parameters are this step; the owner's entry is always 1."""

    def __post_init__(self) -> None:
        owners, copies = _checked(self.owners, self.copies)
        if owners.ndim != 1:
            raise ValueError(f"a layer's owners are [E], got {list(owners.shape)}; all layers together are a Plan")
        object.__setattr__(self, "owners", owners)
        object.__setattr__(self, "copies", copies)

    @property
    def num_experts(self) -> int:
        return self.copies.shape[0]

    @property
    def num_devices(self) -> int:
        return self.copies.shape[1]

    def extra_copies(self) -> np.ndarray:
        """uint8 [E, D]: 1 where an expert has to travel to, that is, the copies without the owners'."""
        return self.copies - owned(self.owners, self.num_devices)


@dataclass(frozen=True, eq=False)
class Plan:
    """Where every expert of every layer is in one step, how rows find it, and what it moves. Compare by ``digest()``.

    Raises:
        ValueError: an owner that is not a rank, copies that leave an owner out, or an unknown word.
    """

    owners: np.ndarray
    """int64 [L, E]."""

    copies: np.ndarray
    """uint8 [L, E, D]."""

    bytes: dict[str, int]
    """Bytes that the plan moves, over all layers and ranks, by kind of collective."""

    layout: Layout = "whole"
    """whole: an expert is on one rank; sliced: over all of them."""

    dispatch: Dispatch = "local"
    """How a row picks among the copies of its expert."""

    timing: Timing = "hidden"
    """hidden: copies travel behind attention; blocking: after the gate, and the step waits."""

    def __post_init__(self) -> None:
        for field, words in (("layout", Layout), ("dispatch", Dispatch), ("timing", Timing)):
            if getattr(self, field) not in get_args(words):
                raise ValueError(f"{field} = {getattr(self, field)!r}: choose one of {', '.join(get_args(words))}")
        owners, copies = _checked(self.owners, self.copies)
        if owners.ndim != 2:
            raise ValueError(f"a plan's owners are [L, E], got {list(owners.shape)}; one layer is a LayerPlan")
        object.__setattr__(self, "owners", owners)
        object.__setattr__(self, "copies", copies)
        object.__setattr__(self, "bytes", {kind: int(moved) for kind, moved in sorted(self.bytes.items())})

    @classmethod
    def whole(
        cls,
        owners: np.ndarray,
        copies: np.ndarray,
        expert_bytes: int,
        *,
        dispatch: Dispatch = "local",
        timing: Timing = "hidden",
    ) -> Plan:
        """A plan of whole experts with its bytes counted: each extra copy receives the parameters once and sends its
        gradient back once. Gradients are counted in the parameters' dtype.
        """
        extra = int(np.count_nonzero(copies)) - np.size(owners)
        moved = {"sparse_all_gather": extra * expert_bytes, "sparse_reduce_scatter": extra * expert_bytes}
        return cls(owners, copies, moved, dispatch=dispatch, timing=timing)

    @property
    def num_layers(self) -> int:
        return self.owners.shape[0]

    def layer(self, index: int) -> LayerPlan:
        """The placement of MoE layer ``index``: views, nothing is copied."""
        return LayerPlan(self.owners[index], self.copies[index])

    def digest(self) -> int:
        """A 63-bit hash of all that the plan says, the same in every process and on every machine.

        It fits an int64, so it can ride in a collective; ranks whose digests differ would wait for different messages.
        """
        words = [str(self.copies.shape), self.layout, self.dispatch, self.timing]
        words += [f"{kind}={moved}" for kind, moved in self.bytes.items()]
        digest = hashlib.blake2b("|".join(words).encode(), digest_size=8)
        digest.update(self.owners.astype("<i8", copy=False).tobytes())
        digest.update(np.packbits(self.copies).tobytes())
        return int.from_bytes(digest.digest(), "little") >> 1


@dataclass(frozen=True, eq=False)
class PlacementState:
    """What a policy plans from besides the loads; equal on every rank, as the controller last published it.

    Raises:
        ValueError: owners that do not fit the cluster, or a number out of range.
    """

    owners: np.ndarray
    """int64 [L, E]: the present owners."""

    cluster: ClusterSpec

    expert_bytes: int
    """Parameter bytes of one expert, X in the paper."""

    overlap_degree: int
    """t: experts a layer whose copies travel while attention computes."""

    extra_slots: int
    """m: copies a layer that a rank has memory for, besides the experts it owns."""

    window: int = DEFAULT_WINDOW
    """w: steps whose mean load is the forecast."""

    def __post_init__(self) -> None:
        owners = check_owners(self.owners, self.cluster.num_devices)
        if owners.ndim != 2:
            raise ValueError(f"owners must be [L, E], got {list(owners.shape)}")
        object.__setattr__(self, "owners", _read_only(owners))
        for field, least in (("expert_bytes", 1), ("overlap_degree", 0), ("extra_slots", 0), ("window", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} = {getattr(self, field)}: must be at least {least}")

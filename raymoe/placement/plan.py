"""What a policy answers: where every expert is in one step. L = MoE layers, E = experts a layer, D = ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from raymoe.placement.sharding import check_owners
from raymoe.placement.workload import Workload

Layout = Literal["whole", "sliced"]
Dispatch = Literal["local", "node", "even", "capacity", "level"]
Timing = Literal["hidden", "overlapped", "blocking"]


def owned(owners: np.ndarray, num_devices: int) -> np.ndarray:
    """The base placement: every expert with its owner only. owners [..., E] -> uint8 [..., E, D]."""
    return (np.asarray(owners)[..., None] == np.arange(num_devices)).astype(np.uint8)


def read_only(array: np.ndarray) -> np.ndarray:
    """The array itself if nobody can write to it, else a copy: a plan must not change under a rank's feet."""
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


def check_copies(copies: np.ndarray, owners: np.ndarray, name: str = "copies") -> np.ndarray:
    """Copies uint8 [..., E, D], read-only, or a ValueError that says which invariant they break."""
    copies = np.asarray(copies)
    if copies.ndim < 2 or copies.shape[:-1] != owners.shape or copies.dtype != np.uint8:
        raise ValueError(
            f"{name} must be uint8 {[*owners.shape, 'D']} to go with owners {list(owners.shape)}, "
            f"got {copies.dtype} {list(copies.shape)}"
        )
    if copies.max() > 1:
        raise ValueError(f"{name} holds {copies.max()}; it says 1 where an expert is and 0 where it is not")
    holds = np.take_along_axis(copies, owners[..., None], axis=-1)[..., 0]
    if not holds.all():
        place = tuple(int(i) for i in np.argwhere(holds == 0)[0])
        raise ValueError(
            f"{name}{list(place)} leaves out rank {owners[place]}, the owner, which always holds its expert"
        )
    return read_only(copies)


@dataclass(frozen=True, eq=False)
class Base:
    """Where experts live from step to step, parameters and optimizer state together; changing it moves state.

    Raises:
        ValueError: owners or resident copies that break an invariant of ``LayerPlan``.
    """

    owners: np.ndarray
    """int64 [L, E]: the rank that the gradient is summed at."""

    resident: np.ndarray
    """uint8 [L, E, D]: 1 where the expert's whole state is. More than the owner for policies that keep replicas."""

    def __post_init__(self) -> None:
        resident = np.asarray(self.resident)
        owners = check_owners(self.owners, resident.shape[-1])
        object.__setattr__(self, "owners", read_only(owners))
        object.__setattr__(self, "resident", check_copies(resident, owners, "resident"))

    @classmethod
    def of_owners(cls, owners: np.ndarray, num_devices: int) -> Base:
        """One home an expert: every policy that keeps no replicas."""
        return cls(owners, owned(owners, num_devices))

    def moved_from(self, before: Base) -> int:
        """How many whole experts a rank has to fetch, over all ranks, to come here from ``before``."""
        return int(np.count_nonzero(self.resident > before.resident))


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

    resident: np.ndarray | None = None
    """uint8 [E, D]: 1 where they are between steps too; None: at the owner only."""

    def __post_init__(self) -> None:
        copies = np.asarray(self.copies)
        owners = check_owners(self.owners, copies.shape[-1])
        if owners.ndim != 1:
            raise ValueError(f"a layer's owners are [E], got {list(owners.shape)}; all layers together are a Plan")
        resident = owned(owners, copies.shape[-1]) if self.resident is None else self.resident
        object.__setattr__(self, "owners", read_only(owners))
        object.__setattr__(self, "copies", check_copies(copies, owners))
        object.__setattr__(self, "resident", check_copies(resident, owners, "resident"))

    @property
    def num_experts(self) -> int:
        return self.copies.shape[0]

    @property
    def num_devices(self) -> int:
        return self.copies.shape[1]

    def extra_copies(self) -> np.ndarray:
        """uint8 [E, D]: 1 where an expert has to travel to, that is, the copies without those that live there."""
        assert self.resident is not None
        return self.copies & ~self.resident & 1


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

    resident: np.ndarray | None = None
    """uint8 [L, E, D]; None: at the owner only."""

    layout: Layout = "whole"
    """whole: an expert lives on one rank; sliced: in equal slices on all of them, and copies are put together of these."""

    dispatch: Dispatch = "local"
    """How a row picks among the copies of its expert; see ``raymoe.placement.dispatch``."""

    timing: Timing = "hidden"
    """What transfers hide behind. hidden: attention; overlapped: attention and expert computation; blocking: nothing."""

    def __post_init__(self) -> None:
        for field, words in (("layout", Layout), ("dispatch", Dispatch), ("timing", Timing)):
            if getattr(self, field) not in get_args(words):
                raise ValueError(f"{field} = {getattr(self, field)!r}: choose one of {', '.join(get_args(words))}")
        copies = np.asarray(self.copies)
        owners = check_owners(self.owners, copies.shape[-1])
        if owners.ndim != 2:
            raise ValueError(f"a plan's owners are [L, E], got {list(owners.shape)}; one layer is a LayerPlan")
        resident = owned(owners, copies.shape[-1]) if self.resident is None else self.resident
        object.__setattr__(self, "owners", read_only(owners))
        object.__setattr__(self, "copies", check_copies(copies, owners))
        object.__setattr__(self, "resident", check_copies(resident, owners, "resident"))
        object.__setattr__(self, "bytes", {kind: int(moved) for kind, moved in sorted(self.bytes.items())})

    @classmethod
    def of(
        cls,
        base: Base,
        copies: np.ndarray,
        workload: Workload,
        *,
        layout: Layout = "whole",
        dispatch: Dispatch = "local",
        timing: Timing = "hidden",
    ) -> Plan:
        """A plan with its bytes counted: each copy that does not live where it is used receives the parameters (twice
        if they are re-materialised) and sends its gradient back once; resident replicas sum gradients and share the sum.
        """
        num_devices = copies.shape[-1]
        gathers = 2 if workload.rematerialise else 1
        if layout == "sliced":
            pieces = int(np.count_nonzero(copies)) * (num_devices - 1)
            gathered = pieces * workload.expert_bytes // num_devices
            reduced = pieces * workload.gradient_bytes // num_devices
        else:
            extra = int(np.count_nonzero(copies > base.resident))
            replicas = int(np.count_nonzero(base.resident)) - base.owners.size
            gathered = extra * workload.expert_bytes
            reduced = (extra + 2 * replicas) * workload.gradient_bytes
        moved = {"sparse_all_gather": gathers * gathered, "sparse_reduce_scatter": reduced}
        return cls(base.owners, copies, moved, base.resident, layout, dispatch, timing)

    @property
    def num_layers(self) -> int:
        return self.owners.shape[0]

    def layer(self, index: int) -> LayerPlan:
        """The placement of MoE layer ``index``: views, nothing is copied."""
        assert self.resident is not None
        return LayerPlan(self.owners[index], self.copies[index], self.resident[index])

    def digest(self) -> int:
        """A 63-bit hash of all that the plan says, the same in every process and on every machine.

        It fits an int64, so it can ride in a collective; ranks whose digests differ would wait for different messages.
        """
        assert self.resident is not None
        words = [str(self.copies.shape), self.layout, self.dispatch, self.timing]
        words += [f"{kind}={moved}" for kind, moved in self.bytes.items()]
        digest = hashlib.blake2b("|".join(words).encode(), digest_size=8)
        digest.update(self.owners.astype("<i8", copy=False).tobytes())
        digest.update(np.packbits(self.copies).tobytes())
        digest.update(np.packbits(self.resident).tobytes())
        return int.from_bytes(digest.digest(), "little") >> 1

"""What a training checkpoint holds, under which names, and what a load says of it."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor

Signature = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor, e.g. `((3, 4), "torch.float32")`."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: damaged, partial, or of another model. Names the file or the tensor."""


class SaveError(RuntimeError):
    """A save did not come about; the checkpoints before it are as they were. Names the step and the path."""


class TrainState(Protocol):
    """The live state of one rank: its tensors are read by a save and written in place by a load."""

    def dense(self) -> dict[str, Tensor]:
        """The same on all ranks, or DTensors; any shape and dtype."""
        ...

    def experts(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        """(layer, expert) that this rank keeps -> its tensors by kind, e.g. `master`, `exp_avg`, each [numel]. Several ranks
        may keep the same expert, with the same values."""
        ...

    def common(self) -> dict[str, object]:
        """Small and equal on all ranks: what JSON can say (keys are strings), and numpy arrays."""
        ...

    def own(self) -> dict[str, Tensor]:
        """Of this rank alone, e.g. states of random generators; a load gives these very tensors back, filled."""
        ...


@dataclass(frozen=True)
class Loaded:
    """What a load found."""

    step: int
    saved_size: int
    """Number of ranks that saved."""
    own_restored: bool
    """Whether every rank got its `own()` tensors back: as many ranks as saved, with the same tensors."""
    own: dict[str, Tensor]
    """What `own()` gave, filled; empty if not restored."""
    common: dict[str, object]


def dense_key(name: str) -> str:
    return f"dense/{name}"


def own_key(rank: int, name: str) -> str:
    return f"own/{rank}/{name}"


def expert_keys(experts: dict[tuple[int, int], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`experts/<layer>/<expert>/<kind>` -> tensor."""
    return {
        f"experts/{layer}/{expert}/{kind}": tensor
        for (layer, expert), kinds in experts.items()
        for kind, tensor in kinds.items()
    }


def signature(tensor: Tensor) -> Signature:
    """Of the whole tensor, also where this rank holds a part of a DTensor."""
    return tuple(tensor.shape), str(tensor.dtype)


def local_part(tensor: Tensor) -> Tensor:
    """What of it lies on this rank."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()

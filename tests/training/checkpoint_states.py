"""States of ranks whose values are known, and their checkpoints."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raymoe.training.checkpoint import (
    Checkpointer,
    latest,
    load,
)

LAYERS, EXPERTS, NUMEL = 2, 5, 37
KINDS = ("master", "exp_avg", "exp_avg_sq")


class State:
    """A rank's state whose every value follows from its name and `seed`; seed None: empty tensors, to be filled."""

    def __init__(self, seed: int | None, keeps: list[tuple[int, int]], rank: int = 0):
        self.seed = seed
        # two more rows than are used, as a pool with copies has
        self.pool = torch.full((len(KINDS), len(keeps) + 2, NUMEL), float("nan"))
        self._experts = {
            key: {kind: self.pool[k, row] for k, kind in enumerate(KINDS)} for row, key in enumerate(keeps)
        }
        self._dense = {
            "parameter/norm": torch.zeros(7, dtype=torch.bfloat16, requires_grad=True),
            "master/attention": torch.zeros(13, 9),
            "exp_avg/attention": torch.zeros(9, 13, dtype=torch.float64).T,
            "step": torch.zeros((), dtype=torch.int64),
            "none": torch.zeros(0, 3),
        }
        self._own = {"rng": torch.zeros(11, dtype=torch.uint8)}
        self.rank = rank
        if seed is not None:
            with torch.no_grad():
                for name, tensor in self.tensors().items():
                    tensor.copy_(value(name, tensor, seed))

    def dense(self) -> dict[str, Tensor]:
        return self._dense

    def experts(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        return self._experts

    def common(self) -> dict[str, object]:
        return {"step": self.seed, "owners": np.arange(6).reshape(2, 3), "history": [{"mean": 0.1 + 0.2}, None]}

    def own(self) -> dict[str, Tensor]:
        return self._own

    def tensors(self) -> dict[str, Tensor]:
        experts = {f"{key}{kind}": tensor for key, kinds in self._experts.items() for kind, tensor in kinds.items()}
        return self._dense | experts | {f"{name} of rank {self.rank}": tensor for name, tensor in self._own.items()}

    def is_that_of(self, seed: int, own: bool = True) -> bool:
        return all(
            torch.equal(tensor, value(name, tensor, seed))
            for name, tensor in self.tensors().items()
            if own or "of rank" not in name
        )


def value(name: str, tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1009 + seed)
    return (torch.randn(tensor.shape, generator=generator) * 50 + 100).to(tensor.dtype)


def kept_by(owners: list[list[int]], rank: int) -> list[tuple[int, int]]:
    return [(layer, expert) for layer, row in enumerate(owners) for expert, owner in enumerate(row) if owner == rank]


ALL = kept_by([[0] * EXPERTS] * LAYERS, 0)


def alone(folder: Path, **options) -> Checkpointer:
    return Checkpointer(folder, rank=0, size=1, group=None, **options)


def newest(folder: Path) -> Path:
    path = latest(folder)
    assert path is not None
    return path


def load_alone(path: Path) -> State:
    state = State(None, ALL)
    load(path, state, rank=0, size=1, group=None)
    return state


def save_alone(folder: Path, *steps: int, **options) -> None:
    checkpointer = alone(folder, **options)
    for step in steps:
        checkpointer.save(step, State(step, ALL))
    checkpointer.close()

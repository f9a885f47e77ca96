"""The dense parameters of a rank, replicated: parameters, gradients and optimizer state each in one run of memory a dtype.

One all-reduce then sums all gradients without packing.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raymoe.config import OptimizerConfig
from raymoe.training.adamw import AdamWRows, square_sum
from raymoe.training.world import World

_ROW = 1 << 18


class ReplicatedDense:
    """Plain data parallelism: every rank holds all of them and makes the same update."""

    def __init__(self, named: dict[str, nn.Parameter], config: OptimizerConfig, world: World):
        self._world = world
        dtypes = dict.fromkeys(p.dtype for p in named.values())
        self._parts = [
            _Flat({name: p for name, p in named.items() if p.dtype == dtype}, config, world.device) for dtype in dtypes
        ]

    def bind(self, world: World) -> None:
        """Goes on among other ranks."""
        self._world = world

    def zero_gradients(self) -> None:
        for part in self._parts:
            part.gradients.zero_()

    def reduce(self) -> None:
        """Sums the gradients over all ranks."""
        for part in self._parts:
            self._world.sent_around("dense_all_reduce", part.gradients.nbytes)
            dist.all_reduce(part.gradients, group=self._world.dense)

    def square_sum(self) -> Tensor:
        """This rank's part of that of all gradients, float64 scalar: summed over ranks each counts once."""
        none = torch.zeros((), dtype=torch.float64, device=self._world.device)
        return sum((square_sum(part.gradients) for part in self._parts), none) if self._world.rank == 0 else none

    def step(self, number: int, lr: float, scale: Tensor | None) -> None:
        """One update; see `AdamWRows.step`."""
        for part in self._parts:
            part.state.step(part.gradients, range(len(part.gradients)), number, lr, scale)

    def tensors(self) -> dict[str, Tensor]:
        """`kind/name of the parameter`: live views, in the shapes of the parameters."""
        return {name: view for part in self._parts for name, view in part.tensors().items()}

    def broadcast(self, teacher: int) -> None:
        """Gives all ranks the values of one: a message for all of a kind, not for each parameter, while training stands still."""
        for part in self._parts:
            for tensor in part.state.tensors().values():
                dist.broadcast(tensor, teacher, group=self._world.dense)

    def refresh(self) -> None:
        """Makes parameters of masters that were written from outside."""
        for part in self._parts:
            part.state.refresh(range(len(part.gradients)))

    def state_bytes(self) -> dict[str, int]:
        """Bytes held, by part."""
        held = {"parameters": 0, "gradients": 0, "optimizer": 0}
        for part in self._parts:
            held["parameters"] += part.state.parameters.nbytes
            held["gradients"] += part.gradients.nbytes
            held["optimizer"] += part.state.optimizer_bytes()
        return held


class _Flat:
    """The parameters of one dtype, [R, C], as the optimizer sees them."""

    def __init__(self, named: dict[str, nn.Parameter], config: OptimizerConfig, device: torch.device):
        self._named = named
        sizes = [p.numel() for p in named.values()]
        columns = min(_ROW, sum(sizes))
        shape = -(-sum(sizes) // columns), columns
        dtype = next(iter(named.values())).dtype
        values, self.gradients = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        for p, value, gradient in zip(named.values(), self._views(values), self._views(self.gradients), strict=True):
            value.copy_(p.detach())
            p.data, p.grad = value, gradient
        self.state = AdamWRows(values, config)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{kind}/{name}": view
            for kind, tensor in self.state.tensors().items()
            for name, view in zip(self._named, self._views(tensor), strict=True)
        }

    def _views(self, flat: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self._named.values()]
        pieces = flat.flatten()[: sum(sizes)].split(sizes)
        return [piece.view(p.shape) for piece, p in zip(pieces, self._named.values(), strict=True)]

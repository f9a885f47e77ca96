"""The dense parameters of a rank, sharded by FSDP2: each rank keeps its part of parameters, gradients and optimizer state.

Source: PyTorch FSDP (arXiv 2304.11277); `torch.distributed.fsdp.fully_shard`.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from raymoe.config import OptimizerConfig
from raymoe.training.adamw import AdamWRows, square_sum
from raymoe.training.world import World


class ShardedDense:
    """A drop-in for `ReplicatedDense`: less memory, and all-gathers and reduce-scatters in place of one all-reduce.

    Shards are float32 at the least; FSDP2 casts to the model's dtype as it gathers, so no master is kept beside them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: list[nn.Module],
        named: dict[str, nn.Parameter],
        config: OptimizerConfig,
        world: World,
    ):
        dtype = model.dtype
        wide = torch.promote_types(dtype, torch.float32)
        for parameter in named.values():
            parameter.data = parameter.data.to(wide)
        mesh = DeviceMesh.from_group(world.dense, world.device.type)
        trained = set(named.values())
        options = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide),
            # experts are on the meta device, and live in slots of their own
            "ignored_params": {p for p in model.parameters() if p not in trained},
        }
        for block in dict.fromkeys(blocks):
            fully_shard(block, **options)
        fully_shard(model, **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # the loss is a mean over all ranks' tokens already: gradients are summed
                module.set_gradient_divide_factor(1.0)
                # gloo knows no other reduction
                module.set_force_sum_reduction_for_comms(True)
        self._world = world
        self._named = {name: cast(DTensor, model.get_parameter(name)) for name in named}
        self._states = {name: _rows_of(p, config) for name, p in self._named.items()}

    def zero_gradients(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    def reduce(self) -> None:
        """Nothing: FSDP2 has reduced the gradients in backward."""

    def square_sum(self) -> Tensor:
        """This rank's part of that of all gradients, float64 scalar: summed over ranks each counts once."""
        none = torch.zeros((), dtype=torch.float64, device=self._world.device)
        return sum((square_sum(self._gradient(name)) for name in self._states if self._gradient(name).numel()), none)

    def step(self, number: int, lr: float, scale: Tensor | None) -> None:
        """One update of this rank's shards; see `AdamWRows.step`."""
        for name, state in self._states.items():
            if state.master.numel():
                state.step(self._gradient(name).view(1, -1), [0], number, lr, scale)

    def tensors(self) -> dict[str, Tensor]:
        """`kind/name of the parameter`: DTensors around live shards."""
        return {
            f"{kind}/{name}": _like(shard, self._named[name])
            for name, state in self._states.items()
            for kind, shard in state.tensors().items()
        }

    def refresh(self) -> None:
        """Nothing: shards are their own masters."""

    def state_bytes(self) -> dict[str, int]:
        """Bytes held, by part."""
        shards = sum(state.master.nbytes for state in self._states.values())
        optimizer = sum(state.optimizer_bytes() for state in self._states.values())
        return {"parameters": shards, "gradients": shards, "optimizer": optimizer}

    def _gradient(self, name: str) -> Tensor:
        gradient = self._named[name].grad
        assert isinstance(gradient, DTensor), "every dense parameter takes part in every step"
        return gradient.to_local()


def whole(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as a plain tensor in the model's dtype; where it is sharded all ranks call this together."""
    return value.full_tensor().to(dtype) if isinstance(value, DTensor) else value


def _rows_of(parameter: DTensor, config: OptimizerConfig) -> AdamWRows:
    return AdamWRows(parameter.to_local().detach().view(1, -1), config)


def _like(shard: Tensor, parameter: DTensor) -> DTensor:
    return DTensor.from_local(
        shard.view(parameter.to_local().shape),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

"""The trained model as a Hugging Face directory: every expert comes to rank 0, a few at a time."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.models import CheckpointWriter, expert_parameter_names
from raymoe.training.dense_sharded import whole
from raymoe.training.trainer import Trainer


def write_model(trainer: Trainer, writer: CheckpointWriter | None) -> None:
    """Writes one layer after another; all ranks call it, rank 0 with a writer."""
    expert_parameters = expert_parameter_names(trainer.moe_layers)
    state = trainer.model.state_dict()
    dense = {name: whole(value, trainer.dtype) for name, value in state.items() if name not in expert_parameters}
    if writer is not None:
        writer.add(dense)
    for layer in trainer.moe_layers:
        flat = _collect(trainer, layer.index)
        if writer is not None and flat is not None:
            writer.add({f"{layer.name}.{name}": view for name, view in layer.layout.views(flat).items()})


def _collect(trainer: Trainer, layer: int) -> Tensor | None:
    """[E, numel] of a layer on rank 0, in the order of the experts."""
    world, pool = trainer.world, trainer.experts.pool
    owners_E = trainer.experts.base.owners[layer]

    def rows(rank: int) -> list[int]:
        return np.flatnonzero(owners_E == rank).tolist()

    mine = pool.parameters[[pool.slots[layer, expert] for expert in rows(world.rank)]]
    if world.rank > 0:
        if len(mine):
            dist.send(mine, group=world.experts, group_dst=0)
        return None
    flat = pool.parameters.new_empty(len(owners_E), pool.layout.numel)
    flat[rows(0)] = mine
    for rank in range(1, world.size):
        theirs = rows(rank)
        if theirs:
            received = flat.new_empty(len(theirs), flat.shape[1])
            dist.recv(received, group=world.experts, group_src=rank)
            flat[torch.tensor(theirs, device=flat.device)] = received
    return flat

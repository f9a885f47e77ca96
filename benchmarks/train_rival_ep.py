"""Rival: transformers' own expert parallelism over FSDP2, after its guide on it: a `DistributedConfig` when loading."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import OlmoeForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from raymoe.benchmarks.train_rival_common import GivenRouting, Step, token_loss
from raymoe.benchmarks.train_workload import TrainWorkload


def build(workload: TrainWorkload, rank: int, workers: int) -> Step:
    """Each worker owns its share of every layer's experts, tokens move by all-to-all; the rest is sharded by FSDP2."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        if rank == 0:
            workload.model().save_pretrained(folder)
        dist.barrier()
        model = OlmoeForCausalLM.from_pretrained(
            shared[0],
            dtype=torch.float32,
            distributed_config=DistributedConfig(
                fsdp_size=workers, ep_size=workers, fsdp_mixed_precision=True, ep_implementation="all_to_all"
            ),
        ).train()
        # rank 0 must not clear the folder before all have read it
        dist.barrier()
    routing = GivenRouting(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=workload.learning_rate, weight_decay=workload.weight_decay, fused=True)

    def step(tokens: Tensor, choices: Tensor) -> float:
        routing.choices = choices
        loss = token_loss(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:])
        loss.backward()
        _clip(parameters, workload.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _clip(parameters: list[torch.nn.Parameter], max_norm: float) -> None:
    """`clip_grad_norm_` refuses parameters on different meshes. Every parameter is sharded, none is replicated: what is here of
    each of them, squared and summed over the workers, is the square of the norm."""
    shards = [parameter.grad.to_local() for parameter in parameters if isinstance(parameter.grad, DTensor)]
    square = torch.stack([shard.norm() for shard in shards]).square().sum()
    dist.all_reduce(square)
    scale = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for shard in shards:
        shard.mul_(scale)

"""Rival: transformers + FSDP2, after PyTorch's "Getting Started with Fully Sharded Data Parallel (FSDP2)"."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from raymoe.benchmarks.train_rival_common import GivenRouting, Step, token_loss
from raymoe.benchmarks.train_workload import TrainWorkload


def build(workload: TrainWorkload, rank: int, workers: int, reshard_after_forward: bool = True) -> Step:
    """Every block, then the root, sharded over all workers; bf16 parameters and activations, fp32 gradients and shards.

    Args:
        reshard_after_forward: free a block's parameters after its forward pass, the documentation's default.
    """
    del rank, workers
    model = workload.model()
    routing = GivenRouting(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=workload.learning_rate, weight_decay=workload.weight_decay, fused=True
    )

    def step(tokens: Tensor, choices: Tensor) -> float:
        routing.choices = choices
        loss = token_loss(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), workload.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step

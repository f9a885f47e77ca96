"""Rival: transformers + accelerate, after its guide "Training on CPU": several processes, `mixed_precision="bf16"`.

Its FSDP plugin is passed as on GPUs, but accelerate 1.15 heeds it on accelerators only (state.py, ``AcceleratorState``): on CPUs
it leaves the plugin out without a word and wraps the model for data parallelism, under autocast. transformers' grouped experts
are no operation that autocast knows, so they run in the parameters' fp32.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin  # pyright: ignore[reportMissingImports]
from torch import Tensor

from raymoe.benchmarks.train_rival_common import GivenRouting, Step, token_loss
from raymoe.benchmarks.train_workload import TrainWorkload


def build(workload: TrainWorkload, rank: int, workers: int) -> Step:
    """Model and optimizer as `Accelerator.prepare` returns them."""
    del rank, workers
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["OlmoeDecoderLayer"],
        reshard_after_forward=True,
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", fsdp_plugin=plugin)
    model = workload.model()
    routing = GivenRouting(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=workload.learning_rate, weight_decay=workload.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    def step(tokens: Tensor, choices: Tensor) -> float:
        routing.choices = choices
        loss = token_loss(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), workload.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step

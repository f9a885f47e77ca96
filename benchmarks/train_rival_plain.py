"""Rival: transformers alone, one process; also the truth that the other rivals' first losses are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from raymoe.benchmarks.train_rival_common import GivenRouting, Step, token_loss
from raymoe.benchmarks.train_workload import TrainWorkload


def build(workload: TrainWorkload, rank: int, workers: int) -> Step:
    """A bf16 model whose parameters are copied from fp32 masters after every step.

    Raises:
        ValueError: more than one worker.
    """
    if workers != 1:
        raise ValueError(f"transformers alone runs in one process, not in {workers}; ask for 1 worker")
    del rank
    model = workload.model()
    masters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType, reportCallIssue]  (transformers wraps nn.Module.to)
    parameters = list(model.parameters())
    routing = GivenRouting(model)
    optimizer = torch.optim.AdamW(masters, lr=workload.learning_rate, weight_decay=workload.weight_decay, fused=True)

    def step(tokens: Tensor, choices: Tensor) -> float:
        routing.choices = choices
        loss = token_loss(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:])
        loss.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, workload.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
        return loss.item()

    return step

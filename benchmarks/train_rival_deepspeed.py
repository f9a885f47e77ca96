"""Rival: DeepSpeed's AutoEP, after its guide: transformers' model as it is, and `expert_parallel` in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed  # pyright: ignore[reportMissingImports]  (lives in its own environment: docs/training.md)
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer  # pyright: ignore[reportMissingImports]
from torch import Tensor

from raymoe.benchmarks.train_rival_common import Step, token_loss
from raymoe.benchmarks.train_workload import TrainWorkload


def build(workload: TrainWorkload, rank: int, workers: int, zero_stage: int = 1) -> Step:
    """Each worker owns its share of every layer's experts, tokens move by all-to-all; the optimizer's state of what is replicated
    is sharded (ZeRO), bf16 parameters with fp32 masters.

    Args:
        zero_stage: 1 or 2; 2 shards gradients too.
    """
    del rank
    deepspeed.init_distributed("gloo")
    config = {
        "train_batch_size": workload.sequences,
        "train_micro_batch_size_per_gpu": workload.sequences // workers,
        "bf16": {"enabled": True},
        "gradient_clipping": workload.clip_norm,
        "zero_optimization": {"stage": zero_stage},
        "expert_parallel": {
            "enabled": True,
            "autoep_size": workers,
            # OLMoE is none of its presets; its layout is described as the guide says
            "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
            "router_pattern": "gate",
            "expert_pattern": "experts",
            "expert_w1": "gate_up_proj",
            "expert_w2": "down_proj",
            "num_experts_attr": "num_experts",
            "top_k_attr": "num_experts_per_tok",
            "score_func": "softmax",
            "score_apply": "post",
            "route_norm": False,
            # its grouped GEMMs are for GPUs
            "use_grouped_mm": False,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": workload.learning_rate, "weight_decay": workload.weight_decay, "torch_adam": True},
        },
        "steps_per_print": 1_000_000,
    }
    model = workload.model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    choices_LTK = torch.empty(0)
    layers = [module for module in engine.module.modules() if isinstance(module, AutoEPMoELayer)]
    if len(layers) != workload.layers:
        raise RuntimeError(f"AutoEP took over {len(layers)} of {workload.layers} MoE layers")
    for index, layer in enumerate(layers):
        layer.router.register_forward_hook(_given(lambda index=index: choices_LTK[index]))

    def step(tokens: Tensor, choices: Tensor) -> float:
        nonlocal choices_LTK
        choices_LTK = choices
        loss = token_loss(engine(input_ids=tokens[:, :-1]).logits, tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        return loss.item()

    dist.barrier()
    return step


def _given(choice: Callable[[], Tensor]):
    """A router hook: the choice is ours, the weights stay the router's own probabilities."""

    def hook(router: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        weights, indices, counts = outputs
        chosen = choice().to(indices.dtype)
        probability = router.gate(inputs[0]).float().softmax(-1).gather(1, chosen)
        return (
            probability.to(weights.dtype),
            chosen,
            torch.bincount(chosen.flatten(), minlength=len(counts)).to(counts.dtype),
        )

    return hook

"""Compile the kernels that a model's MoE layers need before its first step."""

import torch

from raymoe.kernels.warm import warm_up
from raymoe.models.layers import MoELayer, weights_of


def warm_up_layers(layers: list[MoELayer], dtype: torch.dtype, device: torch.device, *, is_training: bool) -> float:
    """Seconds it took: on CUDA one process of a node compiles and the others wait for it; elsewhere there is nothing to do."""
    shapes = set()
    for layer in layers:
        one_expert = torch.empty(1, layer.layout.numel, device="meta")
        _, down, biases = weights_of(layer, layer.layout.views(one_expert))
        hidden_size, inner_size = reversed(down.shape[1:]) if layer.spec.is_transposed else down.shape[1:]
        shapes.add((layer.spec, layer.num_experts, hidden_size, inner_size, layer.top_k, biases is not None))
    return sum(
        warm_up(spec, experts, hidden, inner, dtype, device, is_training=is_training, top_k=top_k, has_bias=has_bias)
        for spec, experts, hidden, inner, top_k, has_bias in shapes
    )

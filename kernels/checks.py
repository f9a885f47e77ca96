"""What rows, weights and routing must have in common; every message names the argument.

T tokens, K choices per token, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymoe.kernels.operands import Experts
from raymoe.kernels.quantize import LARGEST
from raymoe.kernels.spec import ExpertSpec


def given_experts(
    gate_up: Tensor,
    down: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    scales: tuple[Tensor, Tensor] | None,
) -> Experts:
    """The operands as the backends take them."""
    return Experts(gate_up, down, *(biases or (None, None)), *(scales or (None, None)))


def check_experts(hidden: Tensor, experts: Experts, spec: ExpertSpec, hidden_scale: Tensor | None) -> None:
    """Raises ValueError where rows and expert weights do not fit each other."""
    gate_up, down = experts.gate_up, experts.down
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a float tensor [T, H], got {hidden.dtype} {tuple(hidden.shape)}")
    if gate_up.ndim != 3 or down.ndim != 3:
        raise ValueError(
            f"gate_up and down must be [E, out, in], got {tuple(gate_up.shape)} and {tuple(down.shape)}; "
            "stack the experts along the first dimension"
        )
    num_tokens, hidden_size = hidden.shape
    num_experts = gate_up.shape[0]
    inner_size = down.shape[1 if spec.is_transposed else 2]
    up_size = spec.gate_up_factor * inner_size
    is_quantized = experts.gate_up_scale is not None
    if is_quantized and gate_up.dtype not in LARGEST:
        raise ValueError(f"scales belong to weights in {' or '.join(map(str, LARGEST))}, gate_up is {gate_up.dtype}")
    if not is_quantized and gate_up.dtype in LARGEST:
        raise ValueError(f"gate_up is {gate_up.dtype}; give the scales that quantize_experts returned with it")
    weight_dtype = gate_up.dtype if is_quantized else hidden.dtype
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "gate_up": (gate_up, _oriented(num_experts, up_size, hidden_size, spec), weight_dtype),
        "down": (down, _oriented(num_experts, hidden_size, inner_size, spec), weight_dtype),
        "biases[0]": (experts.gate_up_bias, (num_experts, up_size), hidden.dtype),
        "biases[1]": (experts.down_bias, (num_experts, hidden_size), hidden.dtype),
        "scales[0]": (experts.gate_up_scale, (num_experts, up_size), torch.float32),
        "scales[1]": (experts.down_scale, (num_experts, hidden_size), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        _check_place(name, tensor, shape, hidden, experts, spec)
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, hidden is {hidden.dtype}; {name} must be {dtype}")
    if hidden_scale is not None:
        _check_place("hidden_scale", hidden_scale, (num_tokens, inner_size), hidden, experts, spec)
        if not hidden_scale.is_floating_point():
            raise ValueError(f"hidden_scale must be a float tensor, got {hidden_scale.dtype}")


def _check_place(
    name: str, tensor: Tensor, shape: tuple[int, ...], hidden: Tensor, experts: Experts, spec: ExpertSpec
) -> None:
    if tuple(tensor.shape) != shape:
        layout = "[E, in, out] (spec.is_transposed)" if spec.is_transposed else "[E, out, in]"
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}, expected {shape}: hidden is {tuple(hidden.shape)}, down is "
            f"{tuple(experts.down.shape)}, weights are {layout}, is_gated={spec.is_gated}"
        )
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move one of them")


def _oriented(num_experts: int, out_size: int, in_size: int, spec: ExpertSpec) -> tuple[int, int, int]:
    return (num_experts, in_size, out_size) if spec.is_transposed else (num_experts, out_size, in_size)


def check_grad_into(experts: Experts, grad_into: tuple[Tensor, Tensor]) -> None:
    """Raises ValueError where the buffers for the weights' gradients are not like the weights."""
    weights = {"gate_up": experts.gate_up, "down": experts.down}
    for (name, weight), into in zip(weights.items(), grad_into, strict=True):
        if into.shape != weight.shape or into.dtype != weight.dtype or into.device != weight.device:
            raise ValueError(
                f"grad_into for {name} is {into.dtype} {tuple(into.shape)} on {into.device}, "
                f"{name} {weight.dtype} {tuple(weight.shape)} on {weight.device}; they must be alike"
            )


def check_routing(hidden: Tensor, expert_index: Tensor, expert_weight: Tensor) -> None:
    """Raises ValueError where the routing does not fit the rows."""
    if expert_index.ndim != 2 or expert_index.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"expert_index must be [T, K] with T={hidden.shape[0]} as in hidden, got {tuple(expert_index.shape)}"
        )
    if expert_weight.shape != expert_index.shape or not expert_weight.is_floating_point():
        raise ValueError(
            f"expert_weight must be a float tensor {tuple(expert_index.shape)} as expert_index is, "
            f"got {expert_weight.dtype} {tuple(expert_weight.shape)}"
        )
    for name, tensor in (("expert_index", expert_index), ("expert_weight", expert_weight)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move one of them")

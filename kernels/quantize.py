"""Expert weights in 8 bits, one scale for each output channel: half the bytes to read, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from raymoe.kernels.operands import Experts
from raymoe.kernels.spec import ExpertSpec

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest value of each type that weights can be kept in."""


def quantize_experts(
    gate_up: Tensor, down: Tensor, dtype: torch.dtype, spec: ExpertSpec | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Round expert weights to `dtype`, so that each output channel uses its whole range.

    Args:
        gate_up: [E, 2I, H], or as `spec` says.
        down: [E, H, I], or as `spec` says.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
        gate_up and down in `dtype`, and (float32 [E, 2I], float32 [E, H]): what `moe_mlp` and `expert_rows` take as `scales`.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in LARGEST:
        raise ValueError(f"dtype is {dtype}; weights are quantised to {' or '.join(map(str, LARGEST))}")
    spec = spec if spec is not None else ExpertSpec()
    (gate_up, gate_up_scale), (down, down_scale) = (_quantize(w, dtype, spec) for w in (gate_up, down))
    return gate_up, down, (gate_up_scale, down_scale)


def _quantize(weight: Tensor, dtype: torch.dtype, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    inner = 1 if spec.is_transposed else 2
    scale = weight.float().abs().amax(inner, keepdim=True) / LARGEST[dtype]
    # a channel of zeros
    scaled = weight.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale.squeeze(inner)


def dequantized(experts: Experts, dtype: torch.dtype, spec: ExpertSpec) -> Experts:
    """The same experts with weights in `dtype`; as they are if they were not quantised."""
    if experts.gate_up_scale is None or experts.down_scale is None:
        return experts
    inner = 1 if spec.is_transposed else 2
    return experts._replace(
        gate_up=(experts.gate_up.float() * experts.gate_up_scale.unsqueeze(inner)).to(dtype),
        down=(experts.down.float() * experts.down_scale.unsqueeze(inner)).to(dtype),
        gate_up_scale=None,
        down_scale=None,
    )

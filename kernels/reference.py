"""The expert layer as one would write it on a whiteboard: a loop over experts, any dtype, differentiated by autograd.

T tokens, K choices per token, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.kernels.spec import ExpertSpec, apply_gate


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    spec: ExpertSpec,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """One expert's rows [n, H] -> [n, H], before the routing weight; weights are that expert's matrices."""
    if spec.is_transposed:
        gate_up, down = gate_up.T, down.T
    inner = apply_gate(F.linear(x, gate_up, gate_up_bias), spec)
    if scale is not None:
        inner = (inner * scale).to(x.dtype)
    rows = F.linear(inner, down, down_bias)
    return spec.post_norm(rows) if spec.post_norm is not None else rows


def moe_mlp_reference(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    spec: ExpertSpec,
    biases: tuple[Tensor, Tensor] | None,
    hidden_scale: Tensor | None,
) -> Tensor:
    """`moe_mlp` in the plainest form; the truth the other backends are tested against."""
    acc_dtype = torch.promote_types(torch.promote_types(hidden.dtype, torch.float32), expert_weight.dtype)
    out = torch.zeros_like(hidden, dtype=acc_dtype)
    gate_up_bias, down_bias = biases if biases is not None else (None, None)
    for e in range(gate_up.shape[0]):
        token, choice = (expert_index == e).nonzero(as_tuple=True)
        rows = expert_mlp(
            hidden[token],
            gate_up[e],
            down[e],
            spec,
            gate_up_bias[e] if gate_up_bias is not None else None,
            down_bias[e] if down_bias is not None else None,
            hidden_scale[token] if hidden_scale is not None else None,
        )
        out = out.index_add(0, token, rows * expert_weight[token, choice, None].to(acc_dtype))
    return out.to(hidden.dtype)

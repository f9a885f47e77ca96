"""The expert layer as one would write it on a whiteboard: a loop over experts, any dtype, differentiated by autograd.

T tokens, K choices per token, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.kernels.input_scale import halves, joined
from raymoe.kernels.operands import Experts
from raymoe.kernels.spec import ExpertSpec, apply_gate


def expert_mlp(
    x: Tensor,
    experts: Experts,
    slot: int,
    spec: ExpertSpec,
    scale: Tensor | None = None,
    up_x: Tensor | None = None,
) -> Tensor:
    """Rows [n, H] of the expert at a slot -> [n, H], before the routing weight; scale [n, I].

    up_x: [n, H], what the up projection reads where that is not `x`.
    """
    gate_up, down = experts.gate_up[slot], experts.down[slot]
    if spec.is_transposed:
        gate_up, down = gate_up.T, down.T
    gate_up_bias, down_bias = (None if b is None else b[slot] for b in (experts.gate_up_bias, experts.down_bias))
    if up_x is None:
        pre = F.linear(x, gate_up, gate_up_bias)
    else:
        gate_weight, up_weight = halves(gate_up, spec, 0)
        pre = joined(F.linear(x, gate_weight), F.linear(up_x, up_weight), spec)
        pre = pre if gate_up_bias is None else pre + gate_up_bias
    inner = apply_gate(pre, spec)
    if scale is not None:
        inner = (inner * scale).to(x.dtype)
    rows = F.linear(inner, down, down_bias)
    return spec.post_norm(rows) if spec.post_norm is not None else rows


def moe_mlp_reference(
    hidden: Tensor,
    experts: Experts,
    expert_index: Tensor,
    expert_weight: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
    up_hidden: Tensor | None,
) -> Tensor:
    """`moe_mlp` in the plainest form; the truth the other backends are tested against."""
    acc_dtype = torch.promote_types(torch.promote_types(hidden.dtype, torch.float32), expert_weight.dtype)
    out = torch.zeros_like(hidden, dtype=acc_dtype)
    for e in range(experts.gate_up.shape[0]):
        token, choice = (expert_index == e).nonzero(as_tuple=True)
        scale = hidden_scale[token] if hidden_scale is not None else None
        up_rows = up_hidden[token] if up_hidden is not None else None
        rows = expert_mlp(hidden[token], experts, e, spec, scale, up_rows)
        out = out.index_add(0, token, rows * expert_weight[token, choice, None].to(acc_dtype))
    return out.to(hidden.dtype)

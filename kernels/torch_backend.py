"""The expert layer in torch ops: on any device, in any float dtype, for every spec.

T tokens, K choices per token, S routed rows, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymoe.kernels.combine import combine_torch, gather_rows
from raymoe.kernels.grouped_mm import grouped_mm
from raymoe.kernels.operands import Experts
from raymoe.kernels.plan import Plan, has_expert, plan, real_rows
from raymoe.kernels.spec import ExpertSpec, apply_gate


def moe_mlp_torch(
    hidden: Tensor,
    experts: Experts,
    expert_index: Tensor,
    expert_weight: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
    grad_into: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`moe_mlp` from differentiable torch ops. Rows without an expert cost no GEMM."""
    routing = plan(expert_index, experts.gate_up.shape[0])
    gate_up_into, down_into = grad_into if grad_into is not None else (None, None)
    rows = gather_rows(hidden, routing)
    pre = _expert_linear(rows, experts.gate_up, experts.gate_up_bias, routing, spec, gate_up_into)
    inner = apply_gate(pre, spec)
    if hidden_scale is not None:
        inner = (inner * gather_rows(hidden_scale, routing)).to(hidden.dtype)
    rows = _expert_linear(inner, experts.down, experts.down_bias, routing, spec, down_into)
    if spec.post_norm is not None:
        rows = spec.post_norm(rows)
    return combine_torch(rows, routing, expert_weight)


def _expert_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, spec: ExpertSpec, grad_into: Tensor | None
) -> Tensor:
    """Rows [R, in] times their expert's matrix, plus its bias [E, out]."""
    if not spec.is_transposed:
        weight = weight.mT
        grad_into = grad_into.mT if grad_into is not None else None
    out = grouped_mm(x.contiguous(), weight, plan.offsets, grad_into=grad_into)
    if bias is None:
        return out
    out = out + bias.index_select(0, plan.expert[: x.shape[0]].clamp(max=plan.num_experts - 1))
    return out if real_rows(plan) is not None else torch.where(has_expert(plan)[:, None], out, 0)

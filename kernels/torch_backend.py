"""The expert layer in torch ops: grouped_mm where it takes the operands, else a loop over the active experts.

T tokens, K choices per token, S routed rows, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raymoe.kernels.combine import combine_torch, gather_rows
from raymoe.kernels.plan import Plan, has_expert, plan, real_rows
from raymoe.kernels.spec import ExpertSpec, apply_gate


def moe_mlp_torch(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    spec: ExpertSpec,
    biases: tuple[Tensor, Tensor] | None,
    hidden_scale: Tensor | None,
) -> Tensor:
    """`moe_mlp` from differentiable torch ops. Rows without an expert cost no GEMM."""
    routing = plan(expert_index, gate_up.shape[0])
    if not spec.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    gate_up_bias, down_bias = biases if biases is not None else (None, None)
    pre = _expert_linear(gather_rows(hidden, routing), gate_up, gate_up_bias, routing)
    inner = apply_gate(pre, spec)
    if hidden_scale is not None:
        inner = (inner * gather_rows(hidden_scale, routing)).to(hidden.dtype)
    rows = _expert_linear(inner, down, down_bias, routing)
    if spec.post_norm is not None:
        rows = spec.post_norm(rows)
    return combine_torch(rows, routing, expert_weight)


def _expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Rows [R, in] times their expert's matrix of `weight` [E, in, out], plus its bias [E, out]."""
    if _grouped_mm_takes(x, weight):
        out = F.grouped_mm(x, weight, offs=plan.offsets[1:])
    else:
        out = _LoopLinear.apply(x, weight, plan.offsets)
    if bias is not None:
        out = out + bias.index_select(0, plan.expert[: x.shape[0]].clamp(max=plan.num_experts - 1))
    if real_rows(plan) is None:
        # grouped_mm leaves the rows behind the last offset, and their gradients, as it found the memory
        out = torch.where(has_expert(plan)[:, None], out, 0)
    return out


def _grouped_mm_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm takes these operands, forward and backward; `weight` is [E, in, out] of any strides."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.shape[0] == 0:
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    per_16_bytes = 16 // x.element_size()
    stride_e, stride_in, stride_out = weight.stride()
    leading = stride_out if stride_in == 1 else stride_in
    return (
        x.is_contiguous()
        and 1 in (stride_in, stride_out)
        and all(n % per_16_bytes == 0 for n in (stride_e, leading, weight.shape[1], weight.shape[2]))
        and x.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


class _LoopLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets):
        ctx.save_for_backward(x, weight, offsets)
        out = x.new_zeros(x.shape[0], weight.shape[2])
        for e, start, end in _active(offsets):
            torch.mm(x[start:end], weight[e], out=out[start:end])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, offsets = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for e, start, end in _active(offsets):
            if grad_x is not None:
                torch.mm(grad[start:end], weight[e].T, out=grad_x[start:end])
            if grad_weight is not None:
                torch.mm(x[start:end].T, grad[start:end], out=grad_weight[e])
        return grad_x, grad_weight, None


def _active(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, row behind its last) of the experts that have rows."""
    ends = offsets.tolist()
    return [(e, ends[e], ends[e + 1]) for e in range(len(ends) - 1) if ends[e] < ends[e + 1]]

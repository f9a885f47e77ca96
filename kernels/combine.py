"""Bring expert rows home: each token sums its rows, weighted, in slot order.  T tokens, K choices, S rows, H hidden size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raymoe.kernels.backend import sums_in_triton
from raymoe.kernels.plan import Plan, has_expert, real_rows

_SUM = 0
"""embedding_bag's number for that mode."""


def combine(rows: Tensor, plan: Plan, expert_weight: Tensor) -> Tensor:
    """Sum over a token's choices, in slot order, of routing weight times expert row; differentiable in both.

    The product and the sum are in the wider type of the two and at least float32 (float64 for float64).

    Args:
        rows: [S, H] at the plan's sorted positions (or only the first ``offsets[-1]`` rows). Rows without an expert are
            never read.
        expert_weight: [T, K], any float dtype. Weights of choices without an expert are never used, and their gradient
            is zero.

    Returns:
        [T, H] in the dtype of `rows`.

    Raises:
        ValueError: `expert_weight` is not [T, K] of the plan.
    """
    if expert_weight.shape != plan.inverse.shape:
        raise ValueError(
            f"expert_weight is {tuple(expert_weight.shape)}, but the plan is for {tuple(plan.inverse.shape)} choices [T, K]"
        )
    return _combine(rows, plan, expert_weight, "triton" if sums_in_triton(rows.device) else "torch")


def gather_rows(source: Tensor, plan: Plan) -> Tensor:
    """The row of `source` [T, N] that each sorted row needs, differentiable; on CPU only those that have an expert.

    On a device, where the number of such rows is not known to the host, the rest is zeros.
    """
    return _GatherRows.apply(source, *plan) if torch.is_grad_enabled() else _gather(source, plan)


def combine_torch(rows: Tensor, plan: Plan, expert_weight: Tensor) -> Tensor:
    """`combine` in torch ops, whatever the environment asks for."""
    return _combine(rows, plan, expert_weight, "torch")


def _combine(rows: Tensor, plan: Plan, expert_weight: Tensor, backend: str) -> Tensor:
    # serving spends more on autograd's bookkeeping than on the sum of a few rows
    if not torch.is_grad_enabled():
        return _gather_sum(rows, plan, expert_weight, backend)
    return _Combine.apply(rows, expert_weight, backend, *plan)


def _gather_sum(rows: Tensor, plan: Plan, expert_weight: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from raymoe.kernels.gather_sum import triton_gather_sum

        return triton_gather_sum(rows, plan, expert_weight, rows.dtype)
    return torch_gather_sum(rows, plan, expert_weight)


def torch_gather_sum(rows: Tensor, plan: Plan, expert_weight: Tensor | None) -> Tensor:
    """`combine` without autograd; weight None counts as ones."""
    if plan.inverse.numel() == 0:
        return rows.new_zeros(plan.inverse.shape[0], rows.shape[1])
    acc_dtype = torch.promote_types(rows.dtype, torch.float32)
    if expert_weight is not None:
        acc_dtype = torch.promote_types(acc_dtype, expert_weight.dtype)
        expert_weight = expert_weight.to(acc_dtype)
    real = real_rows(plan)
    if real is None:
        out = _gather_sum_masked(rows, plan, expert_weight, acc_dtype)
    else:
        out = _gather_sum_cpu(rows.to(acc_dtype), plan, expert_weight, real)
    return out.to(rows.dtype)


def _gather_sum_cpu(rows: Tensor, plan: Plan, weight: Tensor | None, real: int) -> Tensor:
    # embedding_bag is the one CPU op that gathers, scales and sums in one pass
    inverse = plan.inverse
    if real == inverse.numel():
        num_tokens, top_k = inverse.shape
        starts = torch.arange(0, num_tokens * top_k, top_k)
        flat = weight.reshape(-1) if weight is not None else None
        # the functional form spends as long on finding this out as the sum of one token's rows takes
        return torch.embedding_bag(rows, inverse.reshape(-1), starts, False, _SUM, False, flat)[0]
    is_real = inverse < real
    ends = is_real.sum(dim=1).cumsum(0)
    starts = F.pad(ends[:-1], (1, 0))
    weight = weight[is_real] if weight is not None else None
    return F.embedding_bag(inverse[is_real], rows, starts, per_sample_weights=weight, mode="sum")


def _gather_sum_masked(rows: Tensor, plan: Plan, weight: Tensor | None, acc_dtype: torch.dtype) -> Tensor:
    is_real = plan.inverse < plan.offsets[-1]
    out = rows.new_zeros(plan.inverse.shape[0], rows.shape[1], dtype=acc_dtype)
    for k in range(plan.inverse.shape[1]):
        keep = is_real[:, k : k + 1]
        part = rows[plan.inverse[:, k].clamp(max=rows.shape[0] - 1)].to(acc_dtype)
        if weight is not None:
            part = part * weight[:, k : k + 1]
        # a product with a zero weight would let a NaN through
        out += torch.where(keep, part, 0)
    return out


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, expert_weight, backend, *plan_tensors):
        plan = Plan(*plan_tensors)
        ctx.save_for_backward(rows, expert_weight, *plan)
        return _gather_sum(rows, plan, expert_weight, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        rows, expert_weight, *plan_tensors = ctx.saved_tensors
        plan = Plan(*plan_tensors)
        acc_dtype = torch.promote_types(torch.promote_types(rows.dtype, torch.float32), expert_weight.dtype)
        real = real_rows(plan)
        token, order = plan.token[:real], plan.order[:real]
        weight = expert_weight.reshape(-1)[order].to(acc_dtype)
        grad_rows = grad_weight = None
        grad = grad_out.index_select(0, token)
        if ctx.needs_input_grad[1]:
            dots = _row_dots(grad, rows[: token.numel()], acc_dtype)
            if real is None:
                dots = torch.where(has_expert(plan), dots, 0)
            flat = dots.new_zeros(expert_weight.numel())
            flat[order] = dots
            grad_weight = flat.view_as(expert_weight).to(expert_weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_rows = (grad * weight[:, None]).to(rows.dtype)
            if real is None:
                grad_rows = torch.where(has_expert(plan)[:, None], grad_rows, 0)
            elif rows.shape[0] > real:
                grad_rows = torch.cat([grad_rows, grad_rows.new_zeros(rows.shape[0] - real, rows.shape[1])])
        return grad_rows, grad_weight, None, *[None] * len(plan)


def _row_dots(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a.to(dtype) * b.to(dtype)).sum(dim=-1)


def _gather(source: Tensor, plan: Plan) -> Tensor:
    real = real_rows(plan)
    rows = source.index_select(0, plan.token[:real])
    return rows if real is not None else torch.where(has_expert(plan)[:, None], rows, 0)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, *plan_tensors):
        ctx.save_for_backward(*plan_tensors)
        return _gather(source, Plan(*plan_tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        plan = Plan(*ctx.saved_tensors)
        return torch_gather_sum(grad_rows, plan, None), *[None] * len(plan)

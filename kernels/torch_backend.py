"""The expert layer in torch ops: on any device, in any float dtype, for every spec.

T tokens, K choices per token, S routed rows, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymoe.kernels.combine import combine_torch, gather_rows
from raymoe.kernels.cpu_products import fits_cache, swapped_product
from raymoe.kernels.grouped_mm import grouped_mm
from raymoe.kernels.input_scale import halves, joined
from raymoe.kernels.operands import Experts
from raymoe.kernels.plan import Plan, has_expert, plan, real_rows, row_places
from raymoe.kernels.spec import ExpertSpec, apply_gate

NARROW = 16
"""Rows from which an expert is better computed on its own, as x W^T; measured in float32 on an AMD EPYC (Zen 4)."""


def moe_mlp_torch(
    hidden: Tensor,
    experts: Experts,
    expert_index: Tensor,
    expert_weight: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
    grad_into: tuple[Tensor, Tensor] | None,
    up_hidden: Tensor | None = None,
) -> Tensor:
    """`moe_mlp` from differentiable torch ops. Rows without an expert cost no GEMM.

    up_hidden: [T, H], what the up projections read where that is not `hidden`: gate and up are then two products.
    """
    routing = plan(expert_index, experts.gate_up.shape[0])
    gate_up_into, down_into = grad_into if grad_into is not None else (None, None)
    rows = gather_rows(hidden, routing)
    if up_hidden is None:
        pre = _expert_linear(rows, experts.gate_up, experts.gate_up_bias, routing, spec, gate_up_into)
    else:
        pre = _gate_and_up(rows, gather_rows(up_hidden, routing), experts, routing, spec, gate_up_into)
    inner = apply_gate(pre, spec)
    if hidden_scale is not None:
        inner = (inner * gather_rows(hidden_scale, routing)).to(hidden.dtype)
    rows = _expert_linear(inner, experts.down, experts.down_bias, routing, spec, down_into)
    if spec.post_norm is not None:
        rows = spec.post_norm(rows)
    return combine_torch(rows, routing, expert_weight)


def _gate_and_up(
    gate_rows: Tensor, up_rows: Tensor, experts: Experts, plan: Plan, spec: ExpertSpec, grad_into: Tensor | None
) -> Tensor:
    """Pre-activations [R, 2I] where each half reads rows of its own."""
    dim = 2 if spec.is_transposed else 1
    weights = halves(experts.gate_up, spec, dim)
    biases = (None, None) if experts.gate_up_bias is None else halves(experts.gate_up_bias, spec, 1)
    into = (None, None) if grad_into is None else halves(grad_into, spec, dim)
    gate, up = (
        _expert_linear(rows, weight, bias, plan, spec, buffer)
        for rows, weight, bias, buffer in zip((gate_rows, up_rows), weights, biases, into, strict=True)
    )
    return joined(gate, up, spec)


def takes_narrow(experts: Experts) -> bool:
    """Whether `narrow_rows` gives the same bits wherever an expert stands and whoever is computed beside it.

    Products may round otherwise where an operand does not begin at a multiple of 16 bytes, as views of odd sizes do not.
    """
    return experts.gate_up_scale is None and all(
        weight.data_ptr() % 16 == 0
        and all(n * weight.element_size() % 16 == 0 for n in (weight.stride(0), *weight.shape[1:]))
        for weight in (experts.gate_up, experts.down)
    )


def narrow_rows(
    hidden: Tensor,
    experts: Experts,
    plan: Plan,
    active: list[tuple[int, int]],
    ends: list[int],
    out: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
) -> None:
    """`expert_rows` of the `active` (expert, slot), fewer than `NARROW` rows each: a product for each, all else for all at once."""
    active = sorted(active)
    counts = {slot: ends[e + 1] - ends[e] for e, slot in active}
    where = row_places(ends, [e for e, _ in active])
    token = plan.token[where]
    pre = _each(hidden.index_select(0, token), experts.gate_up, experts.gate_up_bias, counts, spec)
    inner = apply_gate(pre, spec)
    if hidden_scale is not None:
        inner = (inner * hidden_scale.index_select(0, token)).to(hidden.dtype)
    rows = _each(inner.contiguous(), experts.down, experts.down_bias, counts, spec)
    out[where] = spec.post_norm(rows) if spec.post_norm is not None else rows


def _each(x: Tensor, weight: Tensor, bias: Tensor | None, counts: dict[int, int], spec: ExpertSpec) -> Tensor:
    """Rows [R, in] -> [R, out]: of each slot so many rows as `counts` says, one slot behind the other."""
    out = x.new_empty(x.shape[0], weight.shape[2 if spec.is_transposed else 1])
    sizes = list(counts.values())
    is_cached = fits_cache(weight)
    for (slot, size), rows, result in zip(
        counts.items(), x.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=True
    ):
        matrix = weight[slot]
        if is_cached:
            # products walk a matrix in strips, at a fifth of the bandwidth at which memory is read in order
            matrix.sum()
        if spec.is_transposed:
            torch.mm(rows, matrix, out=result)
        elif is_cached and size > 1:
            torch.mm(rows, matrix.T, out=result)
        else:
            swapped_product(matrix, rows, result)
    if bias is not None:
        out += bias[list(counts)].repeat_interleave(torch.tensor(sizes, device=x.device), dim=0)
    return out


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

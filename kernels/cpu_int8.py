"""Experts on a CPU with weights in int8: rows are rounded to int8 as they come, sums are exact integers, forward only.

Half the weight bytes, and the wider unit of the two. T tokens, S routed rows, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raymoe.kernels.operands import Experts
from raymoe.kernels.plan import Plan, row_places
from raymoe.kernels.spec import ExpertSpec, apply_gate


def expert_rows_int8(
    hidden: Tensor,
    experts: Experts,
    plan: Plan,
    expert_ids: Sequence[int],
    slots: Sequence[int],
    out: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
) -> None:
    """`expert_rows` with int8 weights and their scales."""
    assert experts.gate_up_scale is not None
    assert experts.down_scale is not None
    ends = plan.offsets.tolist()
    active = [(slot, e) for e, slot in zip(expert_ids, slots, strict=True) if ends[e] < ends[e + 1]]
    if not active:
        return
    count = {slot: ends[e + 1] - ends[e] for slot, e in active}
    where = row_places(ends, [e for _, e in active])
    token = plan.token[where]
    quantized, scale = _rounded(hidden.float())
    pre = _each(quantized[token], scale[token], experts.gate_up, experts.gate_up_scale, experts.gate_up_bias, count)
    inner = apply_gate(pre, spec)
    if hidden_scale is not None:
        inner = inner * hidden_scale[token]
    rows = _each(*_rounded(inner), experts.down, experts.down_scale, experts.down_bias, count).to(hidden.dtype)
    out[where] = spec.post_norm(rows) if spec.post_norm is not None else rows


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [S, N] in int8 and the scale [S, 1] of each."""
    scale = x.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).mul_(1 / 127)
    return x.div(scale).round_().to(torch.int8), scale


def _each(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, count: dict[int, int]
) -> Tensor:
    """int8 rows [S, in] -> float32 [S, out]: the matrix, scale and bias at each slot times its `count` rows."""
    counts = list(count.values())
    out = x.new_empty(len(x), weight.shape[1], dtype=torch.float32)
    for slot, rows, result in zip(count, x.split(counts), out.split(counts), strict=True):
        # the matrix on the left: see cpu_backend
        result.copy_(torch._int_mm(weight[slot], rows.T).T)  # pyright: ignore[reportPrivateImportUsage]
    index = torch.tensor(list(count)).repeat_interleave(torch.tensor(counts))
    out.mul_(weight_scale.index_select(0, index)).mul_(x_scale)
    return out if bias is None else out.add_(bias.index_select(0, index))

"""`combine` as a Triton kernel: out[t] = sum over k, in order, of weight[t, k] * rows[inverse[t, k]].

T tokens, K choices per token, S rows, N columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.plan import Plan

MAX_IN_FLIGHT = 8
"""Choices whose rows are loaded before the first is summed; more choices are taken in several equal chunks."""


@triton.jit(do_not_specialize=["num_tokens", "top_k"])
def _gather_sum_kernel(
    rows,
    weight,
    out,
    inverse,
    offsets,
    num_experts,
    num_tokens,
    num_cols,
    top_k,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    KC: tl.constexpr,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    first_choice = tl.minimum(token, num_tokens - 1) * top_k
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_keep = cols < num_cols
    real = tl.load(offsets + num_experts)
    acc = tl.zeros((BT, BN), dtype=ACC)
    # All places and weights first, then all rows, then the sum, or the compiler waits for one row before it asks for the
    # next. For the same reason the loads have no masks of their own (there are seven predicate registers): choices without
    # an expert read row 0 and drop it, by selection, as a product with zero would let a NaN through.
    for first in range(0, top_k, KC):
        places = ()
        factors = ()
        for j in tl.static_range(KC):
            k = first + j
            choice = first_choice + (k if EVEN_K else tl.minimum(k, top_k - 1))
            place = tl.load(inverse + choice).to(tl.int32)
            places += (place if EVEN_K else tl.where(k < top_k, place, real),)
            if HAS_WEIGHT:
                factors += (tl.load(weight + choice).to(ACC),)
        parts = ()
        for j in tl.static_range(KC):
            at = tl.where(places[j] < real, places[j], 0).to(tl.int64)[:, None] * num_cols + cols[None, :]
            parts += (tl.load(rows + at, mask=col_keep[None, :], other=0.0),)
        for j in tl.static_range(KC):
            keep = places[j] < real
            part = tl.where(keep[:, None], parts[j], 0.0).to(ACC)
            if HAS_WEIGHT:
                part *= tl.where(keep, factors[j], 0.0)[:, None]
            acc += part
    at = token[:, None] * num_cols + cols[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(token < num_tokens)[:, None] & col_keep[None, :])


def triton_gather_sum(rows: Tensor, plan: Plan, weight: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """[T, N] from `rows` ([S, N], or only those that have an expert); `weight` [T, K], None counts as ones."""
    num_tokens, top_k = plan.inverse.shape
    num_cols = rows.shape[1]
    rows = rows.contiguous()
    out = rows.new_empty(num_tokens, num_cols, dtype=out_dtype)
    if out.numel() == 0 or rows.shape[0] == 0:
        return out.zero_()
    dtypes = (rows.dtype, weight.dtype if weight is not None else rows.dtype)
    block_tokens, block_cols, num_warps = block_shape(rows.element_size())
    chunk = choices_at_once(top_k)
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(num_cols, block_cols))
    with torch.cuda.device_of(rows):
        _gather_sum_kernel[grid](
            rows,
            weight.contiguous() if weight is not None else None,
            out,
            plan.inverse,
            plan.offsets,
            plan.num_experts,
            num_tokens,
            num_cols,
            top_k,
            HAS_WEIGHT=weight is not None,
            ACC=tl.float64 if torch.float64 in dtypes else tl.float32,
            KC=chunk,
            EVEN_K=top_k % chunk == 0,
            BT=block_tokens,
            BN=block_cols,
            num_warps=num_warps,
        )
    return out


def block_shape(item_bytes: int) -> tuple[int, int, int]:
    """(tokens, columns, warps) of one program: one warp, each thread 16 bytes of each row.

    With more warps the compiler saves registers for their sake, and fewer rows are on their way at a time; one warp also
    spreads the few tokens of a decode step over all multiprocessors.
    """
    return (16, 64, 4) if is_interpreted() else (1, 32 * 16 // item_bytes, 1)


def choices_at_once(top_k: int) -> int:
    """At most MAX_IN_FLIGHT, in chunks as equal as can be: 10 choices are two fives, not eight and two."""
    top_k = max(top_k, 1)
    return triton.cdiv(top_k, triton.cdiv(top_k, MAX_IN_FLIGHT))

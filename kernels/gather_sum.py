"""`combine` as a Triton kernel: out[t] = sum over k, in order, of weight[t, k] * rows[inverse[t, k]].

T tokens, K choices per token, S rows, N columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.plan import Plan


@triton.jit
def _gather_sum_kernel(
    rows,
    weight,
    out,
    inverse,
    num_real,
    num_tokens,
    num_cols,
    K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    token_keep = token < num_tokens
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_keep = cols < num_cols
    real = tl.load(num_real)
    acc = tl.zeros((BT, BN), dtype=ACC)
    for k in tl.static_range(K):
        row = tl.load(inverse + token * K + k, mask=token_keep, other=0)
        # choices without an expert are masked in both loads: a product with zero would let a NaN through
        keep = token_keep & (row < real)
        part = tl.load(
            rows + row[:, None] * num_cols + cols[None, :], mask=keep[:, None] & col_keep[None, :], other=0.0
        ).to(ACC)
        if HAS_WEIGHT:
            part *= tl.load(weight + token * K + k, mask=keep, other=0.0).to(ACC)[:, None]
        acc += part
    at = token[:, None] * num_cols + cols[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=token_keep[:, None] & col_keep[None, :])


def triton_gather_sum(rows: Tensor, plan: Plan, weight: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """[T, N] from `rows` ([S, N], or only those that have an expert); `weight` [T, K], None counts as ones."""
    num_tokens, top_k = plan.inverse.shape
    num_cols = rows.shape[1]
    rows = rows.contiguous()
    out = rows.new_empty(num_tokens, num_cols, dtype=out_dtype)
    if out.numel() == 0:
        return out
    dtypes = (rows.dtype, weight.dtype if weight is not None else rows.dtype)
    acc = tl.float64 if torch.float64 in dtypes else tl.float32
    block_tokens, block_cols = (16, 64) if is_interpreted() else (1, 512)
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(num_cols, block_cols))
    with torch.cuda.device_of(rows):
        _gather_sum_kernel[grid](
            rows,
            weight.contiguous() if weight is not None else None,
            out,
            plan.inverse,
            plan.offsets[-1:],
            num_tokens,
            num_cols,
            K=top_k,
            HAS_WEIGHT=weight is not None,
            ACC=acc,
            BT=block_tokens,
            BN=block_cols,
        )
    return out

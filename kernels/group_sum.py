"""Weighted sum of each expert's rows: the gradient of expert biases.  S = routed rows, E experts, N columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.gmm import load_tile, source_rows


@triton.jit
def _group_sum_kernel(
    rows_in,
    row_weight,
    out,
    token,
    offsets,
    num_cols,
    GATHER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    UPCAST: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    expert = tl.program_id(1)
    first = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    col_keep = cols < num_cols
    acc = tl.zeros((BN,), dtype=tl.float32)
    for r in range(first, end, BK):
        rows = r + tl.arange(0, BK)
        keep = rows < end
        source = source_rows(token, rows, keep, GATHER)
        tile = load_tile(rows_in, source, num_cols, keep, cols, 1, col_keep, UPCAST).to(tl.float32)
        if HAS_WEIGHT:
            tile *= tl.load(row_weight + rows, mask=keep, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(tile, axis=0)
    tl.store(out + expert.to(tl.int64) * num_cols + cols, acc.to(out.dtype.element_ty), mask=col_keep)


def group_sum(
    rows: Tensor, offsets: Tensor, *, row_weight: Tensor | None = None, token: Tensor | None = None
) -> Tensor:
    """[E, N] sums in the dtype of `rows`, accumulated in float32; zeros for experts without rows.

    Args:
        rows: contiguous [S, N], or [T, N] with `token`.
        offsets: int32 [E + 1], as in a plan.
        row_weight: [S].
        token: int64 [S], the row of `rows` that each sorted row reads.
    """
    num_experts, num_cols = offsets.numel() - 1, rows.shape[1]
    out = rows.new_empty(num_experts, num_cols)
    if num_experts == 0:
        return out
    block_cols = 64
    with torch.cuda.device_of(rows):
        _group_sum_kernel[(triton.cdiv(num_cols, block_cols), num_experts)](
            rows,
            row_weight,
            out,
            token,
            offsets,
            num_cols,
            GATHER=token is not None,
            HAS_WEIGHT=row_weight is not None,
            UPCAST=is_interpreted(),
            BK=32,
            BN=block_cols,
        )
    return out

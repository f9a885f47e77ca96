"""Weighted sum of each expert's rows: the gradient of expert biases.  S = routed rows, E experts, N columns.

First every tile of rows is summed by a program of its own, so that a popular expert holds up nobody; then the partial
sums of each expert are added in the order of its tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.tiles import tile_table_of

TILE_ROWS = 256


@triton.jit
def _tile_sum_kernel(
    rows_in,
    row_weight,
    parts,
    token,
    tile_row,
    tile_end,
    num_cols,
    GATHER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    first = tl.load(tile_row + tile)
    end = tl.minimum(tl.load(tile_end + tile), first + TILE_ROWS)
    if first >= end:
        return
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_keep = cols < num_cols
    acc = tl.zeros((BN,), dtype=tl.float32)
    for at in range(first, end, BK):
        rows = at + tl.arange(0, BK)
        keep = rows < end
        # rows behind the last are loaded as the last one, and dropped by selection: see gather_sum
        rows = tl.minimum(rows, end - 1)
        source = tl.load(token + rows) if GATHER else rows.to(tl.int64)
        part = tl.load(rows_in + source[:, None] * num_cols + cols[None, :], mask=col_keep[None, :], other=0.0)
        part = tl.where(keep[:, None], part, 0.0).to(tl.float32)
        if HAS_WEIGHT:
            part *= tl.load(row_weight + rows).to(tl.float32)[:, None]
        acc += tl.sum(part, axis=0)
    tl.store(parts + tile.to(tl.int64) * num_cols + cols, acc, mask=col_keep)


@triton.jit
def _expert_sum_kernel(
    parts,
    out,
    offsets,
    num_cols,
    TILE_ROWS: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    expert = tl.program_id(0)
    # how many tiles come before this expert's
    before = tl.arange(0, BE)
    starts = tl.load(offsets + before, mask=before < expert, other=0)
    ends = tl.load(offsets + before + 1, mask=before < expert, other=0)
    first = tl.sum(tl.cdiv(ends - starts, TILE_ROWS), axis=0)
    end = first + tl.cdiv(tl.load(offsets + expert + 1) - tl.load(offsets + expert), TILE_ROWS)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_keep = cols < num_cols
    acc = tl.zeros((BN,), dtype=tl.float32)
    for at in range(first, end, BK):
        tiles = at + tl.arange(0, BK)
        keep = (tiles < end)[:, None] & col_keep[None, :]
        part = tl.load(parts + tiles.to(tl.int64)[:, None] * num_cols + cols[None, :], mask=keep, other=0.0)
        acc += tl.sum(part, axis=0)
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
    num_rows = token.numel() if token is not None else rows.shape[0]
    out = rows.new_empty(num_experts, num_cols)
    if out.numel() == 0 or num_rows == 0:
        return out.zero_()
    # one warp a program, 16 bytes a thread and row: all rows of a block are in the same threads, and on their way at once
    tile_rows, block_rows, block_cols = (32, 8, 64) if is_interpreted() else (TILE_ROWS, 8, 512 // rows.element_size())
    tiles = tile_table_of(offsets, num_rows, tile_rows)
    parts = rows.new_empty(tiles.row.numel(), num_cols, dtype=torch.float32)
    col_blocks = triton.cdiv(num_cols, block_cols)
    with torch.cuda.device_of(rows):
        _tile_sum_kernel[(tiles.row.numel(), col_blocks)](
            rows,
            row_weight,
            parts,
            token,
            tiles.row,
            tiles.end,
            num_cols,
            GATHER=token is not None,
            HAS_WEIGHT=row_weight is not None,
            TILE_ROWS=tile_rows,
            BK=block_rows,
            BN=block_cols,
            num_warps=1,
        )
        _expert_sum_kernel[(num_experts, col_blocks)](
            parts,
            out,
            offsets,
            num_cols,
            TILE_ROWS=tile_rows,
            BE=triton.next_power_of_2(num_experts),
            BK=block_rows,
            BN=block_cols,
            num_warps=2,
        )
    return out

"""Grouped GEMM over ragged rows: each sorted row times its expert's matrix.  S = routed rows.

out[r, n] = sum_k x[source(r), k] * w[slot(r), n, k] + bias[slot(r), n], where source is the row's token or the row itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.tiles import TileConfig, Tiles


@triton.jit
def load_tile(base, rows, row_stride, row_keep, cols, col_stride, col_keep, UPCAST: tl.constexpr):
    """[rows, cols] of a matrix, zeros where not kept; addresses in int64."""
    at = rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    tile = tl.load(base + at, mask=row_keep[:, None] & col_keep[None, :], other=0.0)
    # the interpreter holds bfloat16 as raw bits and computes garbage with them
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def source_rows(token, rows, keep, GATHER: tl.constexpr):
    return tl.load(token + rows, mask=keep, other=0) if GATHER else rows


@triton.jit
def _gmm_kernel(
    x,
    w,
    bias,
    out,
    token,
    tile_row,
    tile_end,
    tile_slot,
    num_cols,
    num_inner,
    x_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    bias_stride,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    first = tl.load(tile_row + tl.program_id(0))
    end = tl.load(tile_end + tl.program_id(0))
    if first >= end:
        return
    slot = tl.load(tile_slot + tl.program_id(0)).to(tl.int64)
    rows = first + tl.arange(0, BM)
    row_keep = rows < end
    source = source_rows(token, rows, row_keep, GATHER)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_keep = cols < num_cols
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    # without it Triton 3.6 serialises the tensor-core pipeline of loops with a run-time bound
    tl.assume(num_inner > 0)
    for k in range(0, num_inner, BK):
        inner = k + tl.arange(0, BK)
        inner_keep = inner < num_inner
        x_tile = load_tile(x, source, x_stride, row_keep, inner, 1, inner_keep, UPCAST)
        w_tile = load_tile(w + slot * w_stride_e, inner, w_stride_k, inner_keep, cols, w_stride_n, col_keep, UPCAST)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + slot * bias_stride + cols, mask=col_keep, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=row_keep[:, None] & col_keep[None, :])


def gmm(
    x: Tensor,
    weight: Tensor,
    tiles: Tiles,
    config: TileConfig,
    out: Tensor,
    *,
    token: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Write the rows of the given tiles to `out`; other rows of it are left alone.

    Args:
        x: contiguous; [T, in] if `token` is given, else [S, in].
        weight: [slots, out, in] of any strides: a transposed view serves transposed layouts and input gradients alike.
        out: contiguous [S, out].
        token: int64 [S], the row of `x` that each sorted row reads.
        bias: [slots, out], the last dimension contiguous.
    """
    num_cols, num_inner = weight.shape[1:]
    grid = (tiles.row.numel(), triton.cdiv(num_cols, config.cols))
    if grid[0] == 0:
        return out
    with torch.cuda.device_of(x):
        _gmm_kernel[grid](
            x,
            weight,
            bias,
            out,
            token,
            *tiles,
            num_cols,
            num_inner,
            x.stride(0),
            *weight.stride(),
            bias.stride(0) if bias is not None else 0,
            GATHER=token is not None,
            HAS_BIAS=bias is not None,
            UPCAST=is_interpreted(),
            BM=config.rows,
            BN=config.cols,
            BK=config.inner,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out

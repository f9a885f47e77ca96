"""Grouped GEMM over ragged rows: each sorted row times its expert's matrix.  S = routed rows.

out[r, n] = sum_k x[source(r), k] * w[slot(r), n, k] + bias[slot(r), n], where source is the row's token or the row itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.configs import GemmConfig
from raymoe.kernels.descriptors import row_operand, weight_operand
from raymoe.kernels.epilogue import column_slice, scale_and_shift
from raymoe.kernels.mainloop import multiply_tile, source_rows
from raymoe.kernels.schedule import launch_options, tile_at, turn_tile, walk
from raymoe.kernels.tiles import Tiles


@triton.jit
def gmm_kernel(
    x,
    w,
    weight_scale,
    bias,
    out,
    token,
    tile_row,
    tile_end,
    tile_slot,
    num_row_tiles,
    num_cols,
    num_inner,
    x_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    weight_scale_stride,
    bias_stride,
    GATHER: tl.constexpr,
    ROWS_BY_TMA: tl.constexpr,
    FORM: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
    IS_PERSISTENT: tl.constexpr,
    IS_FLATTENED: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
    HAS_WEIGHT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row_tiles = tl.load(num_row_tiles)
    col_tiles = tl.cdiv(num_cols, BN)
    BS: tl.constexpr = BN // SLICES
    # the host launches as many programs as there might be tiles
    if not IS_PERSISTENT and tl.program_id(0) >= row_tiles * col_tiles:
        return
    start, stop, step = walk(row_tiles * col_tiles, IS_PERSISTENT)
    for turn in tl.range(start, stop, step, flatten=IS_FLATTENED):
        index = turn_tile(turn, IS_PERSISTENT)
        row_tile, col_tile = tile_at(index, row_tiles, col_tiles, GROUP)
        first = tl.load(tile_row + row_tile)
        slot = tl.load(tile_slot + row_tile)
        rows = first + tl.arange(0, BM)
        row_keep = rows < tl.load(tile_end + row_tile)
        first_col = col_tile * BN
        cols = first_col + tl.arange(0, BN)
        acc = multiply_tile(
            x,
            w,
            source_rows(token, rows, row_keep, GATHER),
            first,
            row_keep,
            slot,
            first_col,
            cols,
            cols < num_cols,
            num_inner,
            x_stride,
            w_stride_e,
            w_stride_n,
            w_stride_k,
            ROWS_BY_TMA,
            FORM,
            IS_SWAPPED,
            UPCAST,
            BM,
            BN,
            BK,
        )
        out_row = out + rows.to(tl.int64)[:, None] * num_cols
        for i in tl.static_range(SLICES):
            cols = first_col + i * BS + tl.arange(0, BS)
            col_keep = cols < num_cols
            part = scale_and_shift(
                column_slice(acc, i, SLICES),
                slot,
                cols,
                col_keep,
                weight_scale,
                weight_scale_stride,
                HAS_WEIGHT_SCALE,
                bias,
                bias_stride,
                HAS_BIAS,
            )
            tl.store(out_row + cols[None, :], part.to(out.dtype.element_ty), mask=row_keep[:, None] & col_keep[None, :])


def gmm(
    x: Tensor,
    weight: Tensor,
    tiles: Tiles,
    config: GemmConfig,
    out: Tensor,
    *,
    token: Tensor | None = None,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Write the rows of the given tiles to `out`; other rows of it are left alone.

    Args:
        x: contiguous; [T, in] if `token` is given, else [S, in].
        weight: [slots, out, in] of any strides: a transposed view serves transposed layouts and input gradients alike. Of
            x's type, or int8 or float8 with `weight_scale`.
        out: contiguous [S, out].
        token: int64 [S], the row of `x` that each sorted row reads.
        bias: [slots, out], the last dimension contiguous.
        weight_scale: float32 [slots, out], what each output channel of quantised weights is multiplied with, before the bias;
            the last dimension contiguous.
    """
    num_cols, num_inner = weight.shape[1:]
    num_tiles = tiles.row.numel() * triton.cdiv(num_cols, config.cols)
    if num_tiles == 0:
        return out
    launch = launch_options(config, num_tiles, x.device)
    x_operand, rows_by_tma = row_operand(x, config) if token is None else (x, False)
    w_operand, form = weight_operand(weight, config)
    with torch.cuda.device_of(x):
        gmm_kernel[launch.grid](
            x_operand,
            w_operand,
            weight_scale,
            bias,
            out,
            token,
            *tiles,
            num_cols,
            num_inner,
            x.stride(0),
            *weight.stride(),
            weight_scale.stride(0) if weight_scale is not None else 0,
            bias.stride(0) if bias is not None else 0,
            GATHER=token is not None,
            ROWS_BY_TMA=rows_by_tma,
            FORM=form,
            HAS_WEIGHT_SCALE=weight_scale is not None,
            HAS_BIAS=bias is not None,
            BN=config.cols,
            **launch.options,
        )
    return out

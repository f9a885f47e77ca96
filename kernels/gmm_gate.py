"""Up-projection with the gate in its epilogue: sorted rows [S, H] -> activated inner rows [S, I].

pre = x[token] @ gate_up[e]^T + bias;  inner = gate(pre) * scale[token].  Pre-activations keep the weights' column layout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.configs import GemmConfig
from raymoe.kernels.descriptors import in_order, row_operand, weight_operand
from raymoe.kernels.epilogue import column_slice, halves, scale_and_shift
from raymoe.kernels.mainloop import multiply_tile, source_rows
from raymoe.kernels.schedule import launch_options, tile_at, turn_tile, walk
from raymoe.kernels.spec import ExpertSpec
from raymoe.kernels.tiles import Tiles
from raymoe.kernels.triton_gates import activate, gate_value


@triton.jit
def gmm_gate_kernel(
    x,
    w,
    weight_scale,
    bias,
    scale,
    pre,
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
    limit,
    alpha,
    offset,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
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
    HAS_SCALE: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row_tiles = tl.load(num_row_tiles)
    col_tiles = tl.cdiv(num_cols, BN)
    COLUMNS: tl.constexpr = 1 if LAYOUT == "plain" else 2
    dtype: tl.constexpr = out.dtype.element_ty
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
        # one product for gate and up: BN columns of each, side by side or alternating as in the weights
        wide = tl.arange(0, COLUMNS * BN)
        if LAYOUT == "halves":
            first_wide = first_col
            inner_col = first_col + wide % BN
            wide_cols = inner_col + wide // BN * num_cols
            wide_keep = inner_col < num_cols
        else:
            first_wide = COLUMNS * first_col
            wide_cols = first_wide + wide
            wide_keep = wide_cols < COLUMNS * num_cols
        acc = multiply_tile(
            x,
            w,
            source_rows(token, rows, row_keep, GATHER),
            first,
            row_keep,
            slot,
            first_wide,
            wide_cols,
            wide_keep,
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
            COLUMNS * BN,
            BK,
        )
        wide_rows = rows.to(tl.int64)[:, None]
        pre_row = pre
        if SAVE_PRE:
            pre_row = pre + wide_rows * (COLUMNS * num_cols)
        for i in tl.static_range(SLICES):
            cols = first_col + i * BS + tl.arange(0, BS)
            col_keep = cols < num_cols
            keep = row_keep[:, None] & col_keep[None, :]
            # pre-activations are rounded before the gate, so that backward recomputes from exactly what was used here
            if LAYOUT == "halves":
                left, right = halves(acc)
                gate = column_slice(left, i, SLICES)
                up = column_slice(right, i, SLICES)
                gate = scale_and_shift(
                    gate,
                    slot,
                    cols,
                    col_keep,
                    weight_scale,
                    weight_scale_stride,
                    HAS_WEIGHT_SCALE,
                    bias,
                    bias_stride,
                    HAS_BIAS,
                ).to(dtype)
                up = scale_and_shift(
                    up,
                    slot,
                    num_cols + cols,
                    col_keep,
                    weight_scale,
                    weight_scale_stride,
                    HAS_WEIGHT_SCALE,
                    bias,
                    bias_stride,
                    HAS_BIAS,
                ).to(dtype)
                if SAVE_PRE:
                    tl.store(pre_row + cols[None, :], gate, mask=keep)
                    tl.store(pre_row + (num_cols + cols)[None, :], up, mask=keep)
            else:
                both_cols = COLUMNS * (first_col + i * BS) + tl.arange(0, COLUMNS * BS)
                both_keep = both_cols < COLUMNS * num_cols
                both = column_slice(acc, i, SLICES)
                both = scale_and_shift(
                    both,
                    slot,
                    both_cols,
                    both_keep,
                    weight_scale,
                    weight_scale_stride,
                    HAS_WEIGHT_SCALE,
                    bias,
                    bias_stride,
                    HAS_BIAS,
                ).to(dtype)
                if SAVE_PRE:
                    tl.store(pre_row + both_cols[None, :], both, mask=row_keep[:, None] & both_keep[None, :])
                if LAYOUT == "pairs":
                    gate, up = tl.split(tl.reshape(both, (BM, BS, 2)))
                else:
                    gate = both
                    up = both
            if LAYOUT == "plain":
                value, _slope = activate(gate.to(tl.float32), alpha, ACTIVATION)
            else:
                value = gate_value(gate.to(tl.float32), up.to(tl.float32), limit, alpha, offset, ACTIVATION, HAS_LIMIT)
            if HAS_SCALE:
                # the token is read again: kept since the main loop, it would cost registers there
                scale_row = scale + tl.load(token + rows, mask=row_keep, other=0)[:, None] * num_cols
                value *= tl.load(scale_row + cols[None, :], mask=keep, other=0.0).to(tl.float32)
            tl.store(out + wide_rows * num_cols + cols[None, :], value.to(dtype), mask=keep)


def column_layout(spec: ExpertSpec) -> str:
    """How gate and up columns stand in the pre-activations: plain (no gate) | halves [gate; up] | pairs (alternating)."""
    if not spec.is_gated:
        return "plain"
    return "pairs" if spec.is_interleaved else "halves"


def gmm_gate(
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    tiles: Tiles,
    config: GemmConfig,
    spec: ExpertSpec,
    out: Tensor,
    *,
    is_sorted: bool = False,
    pre: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Write the activated inner rows of the given tiles to `out`, and the pre-activations to `pre` where given.

    Args:
        x: contiguous [T, H]; [S, H] in sorted order with `is_sorted`.
        weight: [slots, 2I, H] ([slots, I, H] if not gated) of any strides. Of x's type, or int8 or float8 with `weight_scale`.
        token: int64 [S].
        out: contiguous [S, I].
        pre: contiguous [S, 2I] ([S, I] if not gated).
        bias: [slots, 2I] ([slots, I]), the last dimension contiguous.
        scale: contiguous [T, I].
        weight_scale: float32 [slots, 2I] ([slots, I]), likewise: the scales of quantised weights.
    """
    num_inner, num_cols = x.shape[1], out.shape[1]
    num_tiles = tiles.row.numel() * triton.cdiv(num_cols, config.cols)
    if num_tiles == 0:
        return out
    layout = column_layout(spec)
    launch = launch_options(config, num_tiles, x.device)
    x, is_sorted = in_order(x, token, config, is_sorted=is_sorted)
    x_operand, rows_by_tma = row_operand(x, config) if is_sorted else (x, False)
    w_operand, form = weight_operand(weight, config, columns=spec.gate_up_factor, is_pair=layout == "halves")
    with torch.cuda.device_of(x):
        gmm_gate_kernel[launch.grid](
            x_operand,
            w_operand,
            weight_scale,
            bias,
            scale,
            pre,
            out,
            token,
            *tiles,
            num_cols,
            num_inner,
            x.stride(0),
            *weight.stride(),
            weight_scale.stride(0) if weight_scale is not None else 0,
            bias.stride(0) if bias is not None else 0,
            spec.gate_limit if spec.gate_limit is not None else 0.0,
            spec.gate_alpha,
            spec.up_offset,
            ACTIVATION=spec.activation,
            LAYOUT=layout,
            HAS_LIMIT=spec.gate_limit is not None,
            GATHER=not is_sorted,
            ROWS_BY_TMA=rows_by_tma,
            FORM=form,
            HAS_WEIGHT_SCALE=weight_scale is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            SAVE_PRE=pre is not None,
            BN=config.cols,
            **launch.options,
        )
    return out

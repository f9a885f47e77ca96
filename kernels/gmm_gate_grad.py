"""Backward through down-projection, scale and gate in one pass over the sorted rows.

grad = grad_out[token] @ down[e], then per row of weight s, inner value a and scale c (docs/kernels.md has the maths):
grad_pre = s * c * grad * gate'(pre);  scaled_inner = s * c * a;  grad_scale = s * grad * a;  grad_weight = <grad, c * a>.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.configs import GemmConfig
from raymoe.kernels.descriptors import in_order, row_operand, weight_operand
from raymoe.kernels.epilogue import column_slice
from raymoe.kernels.gmm_gate import column_layout
from raymoe.kernels.mainloop import load_rows, multiply_tile, source_rows
from raymoe.kernels.schedule import launch_options, tile_at, turn_tile, walk
from raymoe.kernels.spec import ExpertSpec
from raymoe.kernels.tiles import Tiles
from raymoe.kernels.triton_gates import activate, gate_slopes


@triton.jit
def _bias_dots(
    x,
    source,
    first,
    row_keep,
    bias,
    num_inner,
    x_stride,
    ROWS_BY_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BM]: each row times the bias: a loop of its own, so that the main loop is the same with a bias and without."""
    x_at = x
    if not ROWS_BY_TMA:
        x_at = x + source.to(tl.int64) * x_stride
    dots = tl.zeros((BM,), dtype=tl.float32)
    for k in range(0, num_inner, BK):
        tile = load_rows(x, x_at, first, row_keep, k, num_inner, ROWS_BY_TMA, UPCAST, BK)
        inner = k + tl.arange(0, BK)
        part = tl.load(bias + inner, mask=inner < num_inner, other=0.0).to(tl.float32)
        dots += tl.sum(tile.to(tl.float32) * part[None, :], axis=1)
    return dots


@triton.jit(do_not_specialize=["num_rows"])
def gmm_gate_grad_kernel(
    x,
    w,
    bias,
    scale,
    pre,
    row_weight,
    grad_pre,
    scaled_inner,
    grad_scale,
    grad_weight_parts,
    token,
    tile_row,
    tile_end,
    tile_slot,
    num_row_tiles,
    num_rows,
    num_cols,
    num_inner,
    x_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
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
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row_tiles = tl.load(num_row_tiles)
    col_tiles = tl.cdiv(num_cols, BN)
    dtype: tl.constexpr = grad_pre.dtype.element_ty
    COLUMNS: tl.constexpr = 1 if LAYOUT == "plain" else 2
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
        source = source_rows(token, rows, row_keep, GATHER)
        first_col = col_tile * BN
        cols = first_col + tl.arange(0, BN)
        part = tl.zeros((BM,), dtype=tl.float32)
        if HAS_BIAS and col_tile == 0:
            bias_row = bias + slot.to(tl.int64) * bias_stride
            part = _bias_dots(x, source, first, row_keep, bias_row, num_inner, x_stride, ROWS_BY_TMA, UPCAST, BM, BK)
        acc = multiply_tile(
            x,
            w,
            source,
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
        wide_rows = rows.to(tl.int64)[:, None]
        pre_row = wide_rows * (COLUMNS * num_cols)
        inner_row = wide_rows * num_cols
        weight = tl.load(row_weight + rows, mask=row_keep, other=0.0).to(tl.float32)[:, None]
        for i in tl.static_range(SLICES):
            grad = column_slice(acc, i, SLICES)
            cols = first_col + i * BS + tl.arange(0, BS)
            keep = row_keep[:, None] & (cols < num_cols)[None, :]
            if LAYOUT == "pairs":
                both_cols = 2 * (first_col + i * BS) + tl.arange(0, 2 * BS)
                both_at = pre_row + both_cols[None, :]
                both_keep = row_keep[:, None] & (both_cols < 2 * num_cols)[None, :]
                both = tl.load(pre + both_at, mask=both_keep, other=0.0).to(tl.float32)
                gate, up = tl.split(tl.reshape(both, (BM, BS, 2)))
            else:
                at = pre_row + cols[None, :]
                gate = tl.load(pre + at, mask=keep, other=0.0).to(tl.float32)
                if LAYOUT == "halves":
                    up = tl.load(pre + num_cols + at, mask=keep, other=0.0).to(tl.float32)
            if LAYOUT == "plain":
                value, gate_slope = activate(gate, alpha, ACTIVATION)
                up_slope = gate_slope
            else:
                value, gate_slope, up_slope = gate_slopes(gate, up, limit, alpha, offset, ACTIVATION, HAS_LIMIT)
            weighted = weight * grad
            inner_at = inner_row + cols[None, :]
            if HAS_SCALE:
                tl.store(grad_scale + inner_at, weighted * value, mask=keep)
                scale_row = scale + tl.load(token + rows, mask=row_keep, other=0)[:, None] * num_cols
                factor = tl.load(scale_row + cols[None, :], mask=keep, other=0.0).to(tl.float32)
                weighted *= factor
                value *= factor
            tl.store(scaled_inner + inner_at, (weight * value).to(dtype), mask=keep)
            gate_grad = (weighted * gate_slope).to(dtype)
            up_grad = (weighted * up_slope).to(dtype)
            if LAYOUT == "pairs":
                tl.store(grad_pre + both_at, tl.reshape(tl.join(gate_grad, up_grad), (BM, 2 * BS)), mask=both_keep)
            else:
                tl.store(grad_pre + at, gate_grad, mask=keep)
                if LAYOUT == "halves":
                    tl.store(grad_pre + num_cols + at, up_grad, mask=keep)
            part += tl.sum(grad * value, axis=1)
        # one partial sum a column tile, added up later in a fixed order: atomics would make the result depend on timing
        tl.store(grad_weight_parts + col_tile.to(tl.int64) * num_rows + rows, part, mask=row_keep)


class GateGrad(NamedTuple):
    """What backward needs below the gate; rows without an expert are not written."""

    pre: Tensor
    """[S, 2I] ([S, I] if not gated), gradient of the pre-activations, in their layout."""
    scaled_inner: Tensor
    """[S, I]: inner rows times their routing weight, the right operand of down's gradient."""
    scale: Tensor | None
    """float32 [S, I], gradient of the scale, per row."""
    row_weight: Tensor
    """float32 [S], gradient of the routing weight."""


def gmm_gate_grad(
    grad_out: Tensor,
    down: Tensor,
    token: Tensor,
    pre: Tensor,
    row_weight: Tensor,
    tiles: Tiles,
    config: GemmConfig,
    spec: ExpertSpec,
    *,
    is_sorted: bool = False,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> GateGrad:
    """Backward of the gate, from the gradient of the layer's output.

    Args:
        grad_out: contiguous [T, H]; [S, H] in sorted order with `is_sorted`.
        down: [slots, I, H] of any strides (a view of [slots, H, I] with the last two swapped).
        token: int64 [S].
        pre: contiguous [S, 2I] ([S, I] if not gated), as `gmm_gate` saved them.
        row_weight: [S], routing weight of each sorted row.
        bias: down's bias [slots, H]; it has a part in the gradient of the routing weight.
        scale: contiguous [T, I].
    """
    num_rows, num_cols, num_inner = token.numel(), down.shape[1], grad_out.shape[1]
    num_col_tiles = triton.cdiv(num_cols, config.cols)
    num_tiles = tiles.row.numel() * num_col_tiles
    result = GateGrad(
        torch.empty_like(pre),
        pre.new_empty(num_rows, num_cols),
        pre.new_empty(num_rows, num_cols, dtype=torch.float32) if scale is not None else None,
        pre.new_empty(num_rows, dtype=torch.float32),
    )
    if num_tiles == 0:
        return result
    parts = pre.new_empty(num_col_tiles, num_rows, dtype=torch.float32)
    launch = launch_options(config, num_tiles, grad_out.device)
    grad_out, is_sorted = in_order(grad_out, token, config, is_sorted=is_sorted)
    x_operand, rows_by_tma = row_operand(grad_out, config) if is_sorted else (grad_out, False)
    w_operand, form = weight_operand(down, config)
    with torch.cuda.device_of(grad_out):
        gmm_gate_grad_kernel[launch.grid](
            x_operand,
            w_operand,
            bias,
            scale,
            pre,
            row_weight,
            result.pre,
            result.scaled_inner,
            result.scale,
            parts,
            token,
            *tiles,
            num_rows,
            num_cols,
            num_inner,
            grad_out.stride(0),
            *down.stride(),
            bias.stride(0) if bias is not None else 0,
            spec.gate_limit if spec.gate_limit is not None else 0.0,
            spec.gate_alpha,
            spec.up_offset,
            ACTIVATION=spec.activation,
            LAYOUT=column_layout(spec),
            HAS_LIMIT=spec.gate_limit is not None,
            GATHER=not is_sorted,
            ROWS_BY_TMA=rows_by_tma,
            FORM=form,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            BN=config.cols,
            **launch.options,
        )
    return result._replace(row_weight=parts.sum(0))

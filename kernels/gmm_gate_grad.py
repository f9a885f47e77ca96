"""Backward through down-projection, scale and gate in one pass over the sorted rows.

grad = grad_out[token] @ down[e], then per row of weight s, inner value a and scale c (docs/kernels.md has the maths):
grad_pre = s * c * grad * gate'(pre);  scaled_inner = s * c * a;  grad_scale = s * grad * a;  grad_weight = <grad, c * a>.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.gmm import load_tile
from raymoe.kernels.gmm_gate import column_layout
from raymoe.kernels.spec import ExpertSpec
from raymoe.kernels.tiles import TileConfig, Tiles
from raymoe.kernels.triton_gates import activate, gate_slopes


@triton.jit
def _gmm_gate_grad_kernel(
    grad_out,
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
    num_rows,
    num_cols,
    num_inner,
    col_step,
    up_at,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    bias_stride,
    limit,
    alpha,
    offset,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
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
    source = tl.load(token + rows, mask=row_keep, other=0)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_keep = cols < num_cols
    keep = row_keep[:, None] & col_keep[None, :]
    grad = tl.zeros((BM, BN), dtype=tl.float32)
    bias_part = tl.zeros((BM,), dtype=tl.float32)
    tl.assume(num_inner > 0)
    for k in range(0, num_inner, BK):
        inner = k + tl.arange(0, BK)
        inner_keep = inner < num_inner
        out_tile = load_tile(grad_out, source, num_inner, row_keep, inner, 1, inner_keep, UPCAST)
        w_tile = load_tile(w + slot * w_stride_e, inner, w_stride_k, inner_keep, cols, w_stride_n, col_keep, UPCAST)
        grad = tl.dot(out_tile, w_tile, grad, input_precision="ieee")
        if HAS_BIAS:
            bias_tile = tl.load(bias + slot * bias_stride + inner, mask=inner_keep, other=0.0).to(tl.float32)
            bias_part += tl.sum(out_tile.to(tl.float32) * bias_tile[None, :], axis=1)

    wide_rows = rows.to(tl.int64)[:, None]
    pre_at = wide_rows * (num_cols * (2 if IS_GATED else 1)) + (cols * col_step)[None, :]
    gate = tl.load(pre + pre_at, mask=keep, other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.load(pre + pre_at + up_at, mask=keep, other=0.0).to(tl.float32)
        value, gate_slope, up_slope = gate_slopes(gate, up, limit, alpha, offset, ACTIVATION, HAS_LIMIT)
    else:
        value, gate_slope = activate(gate, alpha, ACTIVATION)
        up_slope = gate_slope

    dtype: tl.constexpr = grad_pre.dtype.element_ty
    weight = tl.load(row_weight + rows, mask=row_keep, other=0.0).to(tl.float32)[:, None]
    inner_at = wide_rows * num_cols + cols[None, :]
    weighted = weight * grad
    if HAS_SCALE:
        factor = tl.load(scale + source[:, None] * num_cols + cols[None, :], mask=keep, other=0.0).to(tl.float32)
        tl.store(grad_scale + inner_at, weighted * value, mask=keep)
        weighted *= factor
        value *= factor
    tl.store(scaled_inner + inner_at, (weight * value).to(dtype), mask=keep)
    tl.store(grad_pre + pre_at, (weighted * gate_slope).to(dtype), mask=keep)
    if IS_GATED:
        tl.store(grad_pre + pre_at + up_at, (weighted * up_slope).to(dtype), mask=keep)
    # one partial sum a column tile, added up later in a fixed order: atomics would make the result depend on timing
    part = tl.sum(grad * value, axis=1)
    if HAS_BIAS:
        part += tl.where(tl.program_id(1) == 0, bias_part, 0.0)
    tl.store(grad_weight_parts + tl.program_id(1).to(tl.int64) * num_rows + rows, part, mask=row_keep)


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
    config: TileConfig,
    spec: ExpertSpec,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> GateGrad:
    """Backward of the gate, from the gradient of the layer's output.

    Args:
        grad_out: contiguous [T, H].
        down: [slots, I, H] of any strides (a view of [slots, H, I] with the last two swapped).
        token: int64 [S].
        pre: contiguous [S, 2I] ([S, I] if not gated), as `gmm_gate` saved them.
        row_weight: [S], routing weight of each sorted row.
        bias: down's bias [slots, H]; it has a part in the gradient of the routing weight.
        scale: contiguous [T, I].
    """
    num_rows, num_cols, num_inner = token.numel(), down.shape[1], grad_out.shape[1]
    grid = (tiles.row.numel(), triton.cdiv(num_cols, config.cols))
    result = GateGrad(
        torch.empty_like(pre),
        pre.new_empty(num_rows, num_cols),
        pre.new_empty(num_rows, num_cols, dtype=torch.float32) if scale is not None else None,
        pre.new_empty(num_rows, dtype=torch.float32),
    )
    if grid[0] == 0:
        return result
    parts = pre.new_empty(grid[1], num_rows, dtype=torch.float32)
    with torch.cuda.device_of(grad_out):
        _gmm_gate_grad_kernel[grid](
            grad_out,
            down,
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
            *column_layout(num_cols, spec),
            *down.stride(),
            bias.stride(0) if bias is not None else 0,
            spec.gate_limit if spec.gate_limit is not None else 0.0,
            spec.gate_alpha,
            spec.up_offset,
            ACTIVATION=spec.activation,
            IS_GATED=spec.is_gated,
            HAS_LIMIT=spec.gate_limit is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            UPCAST=is_interpreted(),
            BM=config.rows,
            BN=config.cols,
            BK=config.inner,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return result._replace(row_weight=parts.sum(0))

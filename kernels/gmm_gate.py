"""Up-projection with the gate in its epilogue: sorted rows [S, H] -> activated inner rows [S, I].

pre = x[token] @ gate_up[e]^T + bias;  inner = gate(pre) * scale[token].  Pre-activations keep the weights' column layout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.gmm import load_tile
from raymoe.kernels.spec import ExpertSpec
from raymoe.kernels.tiles import TileConfig, Tiles
from raymoe.kernels.triton_gates import activate, gate_value


@triton.jit
def _gmm_gate_kernel(
    x,
    w,
    bias,
    scale,
    pre,
    out,
    token,
    tile_row,
    tile_end,
    tile_slot,
    num_cols,
    num_inner,
    col_step,
    up_at,
    x_stride,
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
    SAVE_PRE: tl.constexpr,
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
    gate_cols = cols * col_step
    up_cols = gate_cols + up_at
    weight = w + slot * w_stride_e
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    tl.assume(num_inner > 0)
    for k in range(0, num_inner, BK):
        inner = k + tl.arange(0, BK)
        inner_keep = inner < num_inner
        x_tile = load_tile(x, source, x_stride, row_keep, inner, 1, inner_keep, UPCAST)
        w_tile = load_tile(weight, inner, w_stride_k, inner_keep, gate_cols, w_stride_n, col_keep, UPCAST)
        gate = tl.dot(x_tile, w_tile, gate, input_precision="ieee")
        if IS_GATED:
            w_tile = load_tile(weight, inner, w_stride_k, inner_keep, up_cols, w_stride_n, col_keep, UPCAST)
            up = tl.dot(x_tile, w_tile, up, input_precision="ieee")
    if HAS_BIAS:
        at = bias + slot * bias_stride
        gate += tl.load(at + gate_cols, mask=col_keep, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            up += tl.load(at + up_cols, mask=col_keep, other=0.0).to(tl.float32)[None, :]
    # rounded before the gate, so that backward recomputes from exactly what was used here
    dtype: tl.constexpr = out.dtype.element_ty
    gate = gate.to(dtype)
    up = up.to(dtype)
    wide_rows = rows.to(tl.int64)[:, None]
    if SAVE_PRE:
        pre_row = pre + wide_rows * (num_cols * (2 if IS_GATED else 1))
        tl.store(pre_row + gate_cols[None, :], gate, mask=keep)
        if IS_GATED:
            tl.store(pre_row + up_cols[None, :], up, mask=keep)
    if IS_GATED:
        value = gate_value(gate.to(tl.float32), up.to(tl.float32), limit, alpha, offset, ACTIVATION, HAS_LIMIT)
    else:
        value, _slope = activate(gate.to(tl.float32), alpha, ACTIVATION)
    if HAS_SCALE:
        value *= tl.load(scale + source[:, None] * num_cols + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    tl.store(out + wide_rows * num_cols + cols[None, :], value.to(dtype), mask=keep)


def column_layout(inner_size: int, spec: ExpertSpec) -> tuple[int, int]:
    """(step, distance): gate column i stands at i*step, its up column that distance further."""
    if not spec.is_gated:
        return 1, 0
    return (2, 1) if spec.is_interleaved else (1, inner_size)


def gmm_gate(
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    tiles: Tiles,
    config: TileConfig,
    spec: ExpertSpec,
    out: Tensor,
    *,
    pre: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Write the activated inner rows of the given tiles to `out`, and the pre-activations to `pre` where given.

    Args:
        x: contiguous [T, H].
        weight: [slots, 2I, H] ([slots, I, H] if not gated) of any strides.
        token: int64 [S].
        out: contiguous [S, I].
        pre: contiguous [S, 2I] ([S, I] if not gated).
        bias: [slots, 2I] ([slots, I]), the last dimension contiguous.
        scale: contiguous [T, I].
    """
    num_inner, num_cols = x.shape[1], out.shape[1]
    grid = (tiles.row.numel(), triton.cdiv(num_cols, config.cols))
    if grid[0] == 0:
        return out
    with torch.cuda.device_of(x):
        _gmm_gate_kernel[grid](
            x,
            weight,
            bias,
            scale,
            pre,
            out,
            token,
            *tiles,
            num_cols,
            num_inner,
            *column_layout(num_cols, spec),
            x.stride(0),
            *weight.stride(),
            bias.stride(0) if bias is not None else 0,
            spec.gate_limit if spec.gate_limit is not None else 0.0,
            spec.gate_alpha,
            spec.up_offset,
            ACTIVATION=spec.activation,
            IS_GATED=spec.is_gated,
            HAS_LIMIT=spec.gate_limit is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            SAVE_PRE=pre is not None,
            UPCAST=is_interpreted(),
            BM=config.rows,
            BN=config.cols,
            BK=config.inner,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out

"""Grouped GEMM over a ragged sum: one matrix per expert from its rows; the gradient of expert weights.

out[e] = sum over rows r of expert e of a[source(r)]^T b[source(r)].  S = routed rows, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import load_ragged

from raymoe.kernels.configs import GemmConfig
from raymoe.kernels.descriptors import in_order, ragged_operand
from raymoe.kernels.mainloop import load_tile, source_rows
from raymoe.kernels.schedule import launch_options, tile_at, turn_tile, walk


@triton.jit
def _load_run(
    x,
    source,
    row_keep,
    first,
    num_rows,
    r,
    first_col,
    cols,
    num_cols,
    BY_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[BK, columns] of a run of rows; zeros behind its end in either way, as a NaN may stand there."""
    if BY_TMA:
        tile = load_ragged(x, first, num_rows, [r - first, first_col])
        return tile.to(tl.float32) if UPCAST else tile
    else:
        return load_tile(x, source, num_cols, row_keep, cols, 1, cols < num_cols, UPCAST)


@triton.jit
def gmm_k_kernel(
    a,
    b,
    out,
    token,
    offsets,
    order,
    num_experts,
    a_cols,
    b_cols,
    out_stride_e,
    out_stride_m,
    out_stride_n,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    A_BY_TMA: tl.constexpr,
    B_BY_TMA: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    IS_PERSISTENT: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    num_m = tl.cdiv(a_cols, BM)
    num_n = tl.cdiv(b_cols, BN)
    start, stop, step = walk(num_experts * num_m * num_n, IS_PERSISTENT)
    for turn in tl.range(start, stop, step):
        index = turn_tile(turn, IS_PERSISTENT)
        expert = index // (num_m * num_n)
        if HAS_ORDER:
            expert = tl.load(order + expert)
        m_tile, n_tile = tile_at(index % (num_m * num_n), num_m, num_n, GROUP)
        first = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
        m = m_tile * BM + tl.arange(0, BM)
        n = n_tile * BN + tl.arange(0, BN)
        at = out + (
            expert.to(tl.int64) * out_stride_e
            + m.to(tl.int64)[:, None] * out_stride_m
            + n.to(tl.int64)[None, :] * out_stride_n
        )
        keep = (m < a_cols)[:, None] & (n < b_cols)[None, :]
        if first < end:
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            # see mainloop: a loop that may run zero times is serialised by Triton 3.6
            tl.assume(end > first)
            for r in range(first, end, BK):
                rows = r + tl.arange(0, BK)
                row_keep = rows < end
                a_rows = source_rows(token, rows, row_keep, GATHER_A)
                b_rows = source_rows(token, rows, row_keep, GATHER_B)
                a_tile = _load_run(a, a_rows, row_keep, first, end - first, r, m_tile * BM, m, a_cols, A_BY_TMA, UPCAST)
                b_tile = _load_run(b, b_rows, row_keep, first, end - first, r, n_tile * BN, n, b_cols, B_BY_TMA, UPCAST)
                acc = tl.dot(a_tile.T, b_tile, acc, input_precision="ieee")
            if ACCUMULATE:
                acc += tl.load(at, mask=keep, other=0.0).to(tl.float32)
            tl.store(at, acc.to(out.dtype.element_ty), mask=keep)
        elif not ACCUMULATE:
            tl.store(at, tl.zeros((BM, BN), dtype=out.dtype.element_ty), mask=keep)


def gmm_k(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    config: GemmConfig,
    out: Tensor,
    *,
    token_a: Tensor | None = None,
    token_b: Tensor | None = None,
    order: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Write every expert's matrix to `out`, zeros for experts without rows; float32 sums.

    Args:
        a: contiguous [S, M], or [T, M] with `token_a`.
        b: contiguous [S, N], or [T, N] with `token_b`.
        offsets: int32 [E + 1], as in a plan.
        out: [E, M, N] of any strides.
        token_a: int64 [S], the row of `a` that each sorted row reads.
        token_b: likewise for `b`; where both are given they must be the same tensor.
        order: integer [E], the experts in the order to take them: heavy ones first, so that none of them is left to the end.
        accumulate: add to `out` instead; experts without rows leave theirs alone.
    """
    assert token_a is None or token_b is None or token_a is token_b
    num_experts, a_cols, b_cols = out.shape
    num_tiles = num_experts * triton.cdiv(a_cols, config.rows) * triton.cdiv(b_cols, config.cols)
    if num_tiles == 0:
        return out
    launch = launch_options(config, num_tiles, out.device)
    options = {k: v for k, v in launch.options.items() if k not in ("IS_SWAPPED", "IS_FLATTENED", "SLICES")}
    token = token_a if token_a is not None else token_b
    a, a_is_sorted = in_order(a, token, config, is_sorted=token_a is None)
    b, b_is_sorted = in_order(b, token, config, is_sorted=token_b is None)
    a_operand, a_by_tma = ragged_operand(a, config.rows, config) if a_is_sorted else (a, False)
    b_operand, b_by_tma = ragged_operand(b, config.cols, config) if b_is_sorted else (b, False)
    with torch.cuda.device_of(out):
        gmm_k_kernel[launch.grid](
            a_operand,
            b_operand,
            out,
            token,
            offsets,
            order,
            num_experts,
            a_cols,
            b_cols,
            *out.stride(),
            GATHER_A=not a_is_sorted,
            GATHER_B=not b_is_sorted,
            A_BY_TMA=a_by_tma,
            B_BY_TMA=b_by_tma,
            HAS_ORDER=order is not None,
            ACCUMULATE=accumulate,
            BN=config.cols,
            **options,
        )
    return out

"""Grouped GEMM over a ragged sum: one matrix per expert from its rows; the gradient of expert weights.

out[e] = sum over rows r of expert e of a[source(r)]^T b[source(r)].  S = routed rows, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.gmm import load_tile, source_rows
from raymoe.kernels.tiles import TileConfig


@triton.jit
def _gmm_k_kernel(
    a,
    b,
    out,
    token,
    offsets,
    a_cols,
    b_cols,
    out_stride_e,
    out_stride_m,
    out_stride_n,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    expert = tl.program_id(2)
    first = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_keep = m < a_cols
    n_keep = n < b_cols
    at = (
        expert.to(tl.int64) * out_stride_e
        + m.to(tl.int64)[:, None] * out_stride_m
        + n.to(tl.int64)[None, :] * out_stride_n
    )
    out_keep = m_keep[:, None] & n_keep[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if first >= end:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=out_keep)
        return
    # see gmm: a loop that may run zero times is serialised by Triton 3.6
    tl.assume(end > first)
    for r in range(first, end, BK):
        rows = r + tl.arange(0, BK)
        row_keep = rows < end
        a_tile = load_tile(a, source_rows(token, rows, row_keep, GATHER_A), a_cols, row_keep, m, 1, m_keep, UPCAST)
        b_tile = load_tile(b, source_rows(token, rows, row_keep, GATHER_B), b_cols, row_keep, n, 1, n_keep, UPCAST)
        acc = tl.dot(tl.trans(a_tile), b_tile, acc, input_precision="ieee")
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=out_keep)


def gmm_k(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    config: TileConfig,
    out: Tensor,
    *,
    token_a: Tensor | None = None,
    token_b: Tensor | None = None,
) -> Tensor:
    """Write every expert's matrix to `out`, zeros for experts without rows; float32 sums.

    Args:
        a: contiguous [S, M], or [T, M] with `token_a`.
        b: contiguous [S, N], or [T, N] with `token_b`.
        offsets: int32 [E + 1], as in a plan.
        out: [E, M, N] of any strides.
        token_a: int64 [S], the row of `a` that each sorted row reads.
        token_b: likewise for `b`; where both are given they must be the same tensor.
    """
    assert token_a is None or token_b is None or token_a is token_b
    num_experts, a_cols, b_cols = out.shape
    if num_experts == 0:
        return out
    grid = (triton.cdiv(a_cols, config.rows), triton.cdiv(b_cols, config.cols), num_experts)
    with torch.cuda.device_of(out):
        _gmm_k_kernel[grid](
            a,
            b,
            out,
            token_a if token_a is not None else token_b,
            offsets,
            a_cols,
            b_cols,
            *out.stride(),
            GATHER_A=token_a is not None,
            GATHER_B=token_b is not None,
            UPCAST=is_interpreted(),
            BM=config.rows,
            BN=config.cols,
            BK=config.inner,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out

"""The loop that all grouped GEMMs over ragged rows share: one tile of x[source] @ w[slot]^T, however its operands arrive.

Rows come through gathered pointers (cp.async) or, where they stand in sorted order, a TMA descriptor; weights through pointers or
a descriptor over the strided expert buffers (`descriptors.py` decides and names the forms).
"""

import triton
import triton.language as tl


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
def load_rows(x, at, first, row_keep, k, num_inner, BY_TMA: tl.constexpr, UPCAST: tl.constexpr, BK: tl.constexpr):
    """[BM, BK] of the rows: of a descriptor from row `first` on, else of the row addresses `at`."""
    if BY_TMA:
        # rows behind the expert's last are the next expert's: they cannot reach the kept rows of the product
        tile = x.load([first, k])
    else:
        inner = k + tl.arange(0, BK)
        tile = tl.load(at[:, None] + inner[None, :], mask=row_keep[:, None] & (inner < num_inner)[None, :], other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def load_weights(
    w,
    at,
    slot,
    first_col,
    col_keep,
    k,
    num_inner,
    stride_k,
    FORM: tl.constexpr,
    UPCAST: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """[BN, BK] of one expert's matrix, from a descriptor of the given form or from the column addresses `at`."""
    if FORM == "pointers":
        inner = k + tl.arange(0, BK)
        step = inner.to(tl.int64) * stride_k
        tile = tl.load(at[:, None] + step[None, :], mask=col_keep[:, None] & (inner < num_inner)[None, :], other=0.0)
    elif FORM == "nk":
        tile = w.load([slot, first_col, k]).reshape(BN, BK)
    elif FORM == "nk_pair":
        tile = w.load([slot, 0, first_col, k]).reshape(BN, BK)
    else:
        tl.static_assert(FORM == "kn")
        tile = w.load([slot, k, first_col]).reshape(BK, BN).T
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def multiply_tile(
    x,
    w,
    source,
    first,
    row_keep,
    slot,
    first_col,
    cols,
    col_keep,
    num_inner,
    x_stride,
    w_stride_e,
    w_stride_n,
    w_stride_k,
    ROWS_BY_TMA: tl.constexpr,
    FORM: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BM, BN]: rows `source` (of a descriptor: from `first` on) times columns `cols` of the matrix at `slot`.

    `first_col` is where a descriptor's tile starts. Weights of another type are converted to the rows' type, which is exact for
    int8 and float8; their scales are the caller's.
    """
    x_at = x
    if not ROWS_BY_TMA:
        x_at = x + source.to(tl.int64) * x_stride
    w_at = w
    if FORM == "pointers":
        w_at = w + (slot.to(tl.int64) * w_stride_e + cols.to(tl.int64) * w_stride_n)
    acc = tl.zeros((BN, BM) if IS_SWAPPED else (BM, BN), dtype=tl.float32)
    # without it Triton 3.6 serialises the tensor-core pipeline of loops with a run-time bound
    tl.assume(num_inner > 0)
    for k in range(0, num_inner, BK):
        x_tile = load_rows(x, x_at, first, row_keep, k, num_inner, ROWS_BY_TMA, UPCAST, BK)
        w_tile = load_weights(w, w_at, slot, first_col, col_keep, k, num_inner, w_stride_k, FORM, UPCAST, BN, BK)
        w_tile = w_tile.to(x_tile.dtype)
        if IS_SWAPPED:
            acc = tl.dot(w_tile, x_tile.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
    return acc.T if IS_SWAPPED else acc

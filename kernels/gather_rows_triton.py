"""Copy token rows to the sorted rows that read them, for GEMMs that take both operands by TMA, which gathers no rows on Hopper.

T tokens, K choices per token, S = T*K sorted rows, N columns. Two kernels write the same: `gather_rows_triton` reads a
token's row once for each of its sorted rows, `spread_rows_triton` reads it once and writes it K times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted


@triton.jit(do_not_specialize=["num_rows"])
def _gather_rows_kernel(source, out, token, real_end, num_rows, num_cols, BR: tl.constexpr, BN: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BR
    real = tl.minimum(tl.load(real_end), num_rows)
    if first >= real:
        return
    rows = first + tl.arange(0, BR)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_keep = cols < num_cols
    # rows behind the last are loaded as the last one: a mask for each row would make the loads wait for each other
    at = tl.load(token + tl.minimum(rows, real - 1))
    tile = tl.load(source + at[:, None] * num_cols + cols[None, :], mask=col_keep[None, :], other=0.0)
    tl.store(out + rows[:, None] * num_cols + cols[None, :], tile, mask=(rows < real)[:, None] & col_keep[None, :])


@triton.jit(do_not_specialize=["top_k"])
def _spread_rows_kernel(source, out, inverse, real_end, top_k, num_cols, KC: tl.constexpr, BN: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_keep = cols < num_cols
    real = tl.load(real_end)
    row = tl.load(source + token * num_cols + cols, mask=col_keep, other=0.0)
    for first in range(0, top_k, KC):
        # all places before the first store, which the compiler would not move a load across
        places = ()
        for j in tl.static_range(KC):
            k = first + j
            places += (tl.load(inverse + token * top_k + k, mask=k < top_k, other=real),)
        for j in tl.static_range(KC):
            tl.store(out + places[j] * num_cols + cols, row, mask=col_keep & (places[j] < real))


def gather_rows_triton(source: Tensor, token: Tensor, offsets_end: Tensor, out: Tensor | None = None) -> Tensor:
    """[S, N] with row r = source[token[r]]; rows without an expert are left as they are in `out`.

    Args:
        source: contiguous [T, N].
        token: int64 [S].
        offsets_end: int32 [1], how many sorted rows have an expert: the last of a plan's offsets.
        out: contiguous [S, N], the dtype of `source`; default: a new one.
    """
    num_rows, num_cols = token.numel(), source.shape[1]
    out = out if out is not None else source.new_empty(num_rows, num_cols)
    if out.numel() == 0:
        return out
    block_rows, block_cols = (16, 64) if is_interpreted() else (8, _warp_cols(source))
    grid = (triton.cdiv(num_rows, block_rows), triton.cdiv(num_cols, block_cols))
    with torch.cuda.device_of(source):
        _gather_rows_kernel[grid](
            source, out, token, offsets_end, num_rows, num_cols, BR=block_rows, BN=block_cols, num_warps=1
        )
    return out


def spread_rows_triton(source: Tensor, inverse: Tensor, offsets_end: Tensor, out: Tensor | None = None) -> Tensor:
    """What `gather_rows_triton` writes, from `inverse`, int64 [T, K]: (1 + K) / 2K of the memory traffic."""
    num_tokens, top_k = inverse.shape
    num_cols = source.shape[1]
    out = out if out is not None else source.new_empty(inverse.numel(), num_cols)
    if out.numel() == 0:
        return out
    block_cols = 64 if is_interpreted() else 4 * _warp_cols(source)
    grid = (num_tokens, triton.cdiv(num_cols, block_cols))
    with torch.cuda.device_of(source):
        _spread_rows_kernel[grid](
            source, out, inverse, offsets_end, top_k, num_cols, KC=min(top_k, 8), BN=block_cols, num_warps=4
        )
    return out


def _warp_cols(source: Tensor) -> int:
    """Columns that a warp covers with 16 bytes a thread."""
    return 32 * 16 // source.element_size()

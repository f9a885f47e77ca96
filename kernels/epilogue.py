"""What stands between a product and its result: column slices, scales of quantised weights, biases."""

import triton
import triton.language as tl


@triton.jit
def halves(x):
    """Left and right half of the columns, in registers."""
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def column_slice(x, INDEX: tl.constexpr, COUNT: tl.constexpr):
    """Column slice INDEX of COUNT (a power of two, at most 16), in registers.

    A wide epilogue works slice by slice, as its intermediates do not fit beside the accumulators.
    """
    tl.static_assert(COUNT == 1 or COUNT == 2 or COUNT == 4 or COUNT == 8 or COUNT == 16)
    LEVELS: tl.constexpr = (COUNT >= 2) + (COUNT >= 4) + (COUNT >= 8) + (COUNT >= 16)
    part = x
    for level in tl.static_range(LEVELS):
        left, right = halves(part)
        part = right if (INDEX >> (LEVELS - 1 - level)) & 1 else left
    return part


@triton.jit
def scale_and_shift(
    part,
    slot,
    cols,
    col_keep,
    weight_scale,
    weight_scale_stride,
    HAS_WEIGHT_SCALE: tl.constexpr,
    bias,
    bias_stride,
    HAS_BIAS: tl.constexpr,
):
    """Columns of a product times the scale of their quantised weights, plus their bias."""
    if HAS_WEIGHT_SCALE:
        at = weight_scale + slot.to(tl.int64) * weight_scale_stride
        part *= tl.load(at + cols, mask=col_keep, other=0.0)[None, :]
    if HAS_BIAS:
        at = bias + slot.to(tl.int64) * bias_stride
        part += tl.load(at + cols, mask=col_keep, other=0.0).to(tl.float32)[None, :]
    return part

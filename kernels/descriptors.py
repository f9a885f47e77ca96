"""Which operands TMA can fetch, and their descriptors.

TMA wants a 16-byte aligned base, strides that are multiples of 16 bytes and one unit stride; everything else goes by pointers.
Descriptors are made on the host: they cost no scratch memory and are captured in a CUDA graph by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from raymoe.kernels.configs import GemmConfig

_MAX_STRIDE_BYTES = 2**40
_MAX_BOX = 256
_MAX_RAGGED_ROWS = 2**30


def takes_tma(base: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> bool:
    """Whether TMA can fetch `block`s of a strided view from `base` on; strides in elements."""
    item = base.element_size()
    return (
        base.data_ptr() % 16 == 0
        and strides[-1] == 1
        and all(s * item % 16 == 0 and 0 < s * item < _MAX_STRIDE_BYTES for s in strides[:-1])
        and all(0 < n < 2**31 for n in shape)
        and all(b <= _MAX_BOX for b in block)
        and block[-1] * item >= 16
    )


def in_order(x: Tensor, token: Tensor | None, config: GemmConfig, *, is_sorted: bool) -> tuple[Tensor, bool]:
    """(x, whether it is in sorted order): rows that `token` names are gathered first where `config` wants TMA to fetch them."""
    if is_sorted or token is None or config.inputs != "descriptor":
        return x, is_sorted
    return x.index_select(0, token), True


def row_operand(x: Tensor, config: GemmConfig) -> tuple[Any, bool]:
    """(x, False), or (descriptor of its tiles, True), for a matrix [rows, inner] in sorted order."""
    block = [config.rows, config.inner]
    if config.inputs != "descriptor" or not takes_tma(x, x.shape, x.stride(), block):
        return x, False
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block), True


def ragged_operand(x: Tensor, block_cols: int, config: GemmConfig) -> tuple[Any, bool]:
    """Likewise for sums over rows: tiles end with the run of rows that the kernel names, and what is behind reads as zeros."""
    block = [config.inner, block_cols]
    if config.inputs != "descriptor" or not takes_tma(x, x.shape, x.stride(), block) or x.shape[0] > _MAX_RAGGED_ROWS:
        return x, False
    return create_ragged_descriptor(x, block), True


def weight_operand(weight: Tensor, config: GemmConfig, *, columns: int = 1, is_pair: bool = False) -> tuple[Any, str]:
    """The weights [slots, out, in] as a kernel takes them, and the name of the form.

    pointers: any strides. nk, kn: descriptor of tiles [cols, inner] (kn: stored transposed). nk_pair: the out dimension is two
    halves, and a tile is as many columns of each; transposed weights in halves go by pointers, as Triton brings such a tile to
    the tensor cores through registers and waits for each product.

    Args:
        columns: of the weights, for each column of the result.
        is_pair: they are the same column of the two halves, not neighbours.
    """
    slots, out_size, in_size = weight.shape
    stride_e, stride_n, stride_k = weight.stride()
    inner = (in_size, stride_k, config.inner)
    if is_pair:
        form = "nk_pair"
        half = out_size // 2
        dims = [(2, half * stride_n, 2), (half, stride_n, config.cols), inner]
    else:
        form = "nk" if stride_k == 1 else "kn"
        dims = [(out_size, stride_n, columns * config.cols), inner]
        if form == "kn":
            dims.reverse()
    shape, strides, block = (list(part) for part in zip((slots, stride_e, 1), *dims, strict=True))
    if config.weights != "descriptor" or not takes_tma(weight, shape, strides, block):
        return weight, "pointers"
    return TensorDescriptor(weight, shape, strides, block), form

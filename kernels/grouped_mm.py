"""Each sorted row times its expert's matrix, as one differentiable op.  S rows, E experts, K columns in, N columns out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.kernels.backend import has_fast_half
from raymoe.kernels.cpu_products import is_large, swapped_product


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, *, grad_into: Tensor | None = None) -> Tensor:
    """Multiply runs of rows, each with its own matrix; differentiable in `x` and `weight`.

    Beyond `torch.nn.functional.grouped_mm` it takes every float dtype, any strides and odd sizes, gives zeros behind the last
    run, and can add the weights' gradient to a buffer that is there already.

    Args:
        x: [S, K]; the rows of run e are ``offsets[e]`` to ``offsets[e + 1]``.
        weight: [E, K, N], any strides; fastest on a CPU if each matrix is the transpose of a contiguous [N, K].
        offsets: int32 [E + 1], ascending from 0, as in a `Plan`.
        grad_into: [E, K, N], any strides: backward adds the weights' gradient to it, and `weight` gets none.

    Returns:
        [S, N]; rows from ``offsets[E]`` on are zeros, and what stands in them in `x` reaches nothing.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    _check(x, weight, offsets, grad_into)
    return _forward(x, weight, offsets, grad_into)


def _check(x: Tensor, weight: Tensor, offsets: Tensor, grad_into: Tensor | None) -> None:
    if x.ndim != 2 or weight.ndim != 3 or not x.is_floating_point() or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be a float tensor [S, K] and weight [E, K, N], got {x.dtype} {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if offsets.dtype != torch.int32 or offsets.shape != (weight.shape[0] + 1,):
        raise ValueError(
            f"offsets must be int32 [{weight.shape[0] + 1}], one more than there are matrices, "
            f"got {offsets.dtype} {tuple(offsets.shape)}"
        )
    for name, tensor in (("weight", weight), ("grad_into", grad_into)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}")
    if grad_into is not None and grad_into.shape != weight.shape:
        raise ValueError(f"grad_into is {tuple(grad_into.shape)}, weight {tuple(weight.shape)}; they must be equal")


@torch.library.custom_op("raymoe::grouped_mm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, offsets: Tensor, grad_into: Tensor | None) -> Tensor:
    return _product(x, weight, offsets)


@_forward.register_fake
def _(x, weight, offsets, grad_into):
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("raymoe::grouped_mm_input_grad", mutates_args=())
def _input_grad(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return _product(grad, weight.mT, offsets)


@_input_grad.register_fake
def _(grad, weight, offsets):
    return grad.new_empty(grad.shape[0], weight.shape[1])


@torch.library.custom_op("raymoe::grouped_mm_weight_grad", mutates_args=())
def _weight_grad(x: Tensor, grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = torch.empty_like(weight)
    for matrix, start, end in _runs(out, offsets):
        if start == end:
            matrix.zero_()
        else:
            torch.mm(x[start:end].T, grad[start:end], out=matrix)
    return out


@_weight_grad.register_fake
def _(x, grad, weight, offsets):
    return torch.empty_like(weight)


@torch.library.custom_op("raymoe::grouped_mm_weight_grad_into", mutates_args=("into",))
def _weight_grad_into(x: Tensor, grad: Tensor, offsets: Tensor, into: Tensor) -> None:
    for matrix, start, end in _runs(into, offsets):
        if start < end:
            matrix.addmm_(x[start:end].T, grad[start:end])


def _setup_context(ctx, inputs, output):
    x, weight, offsets, grad_into = inputs
    ctx.save_for_backward(x, weight, offsets)
    # a buffer that backward writes is no saved tensor: autograd would refuse its new version
    ctx.grad_into = grad_into


def _backward(ctx, grad):
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = _input_grad(grad, weight, offsets) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.grad_into is not None:
        _weight_grad_into(x, grad, offsets, ctx.grad_into)
    elif ctx.needs_input_grad[1]:
        grad_weight = _weight_grad(x, grad, weight, offsets)
    return grad_x, grad_weight, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if x.is_cuda or (not is_large(weight) and takes_grouped_mm(x, weight)):
        out = F.grouped_mm(x, weight, offs=offsets[1:]) if takes_grouped_mm(x, weight) else _loop(x, weight, offsets)
    else:
        out = _loop(x, weight, offsets)
    # grouped_mm leaves the rows behind the last run as it found the memory
    if x.is_cuda:
        return torch.where((torch.arange(x.shape[0], device=x.device) < offsets[-1])[:, None], out, 0)
    out[offsets[-1] :] = 0
    return out


def _loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[2])
    is_swapped = not x.is_cuda and has_fast_half(x.dtype) and weight.stride(1) == 1
    for matrix, start, end in _runs(weight, offsets):
        if start == end:
            continue
        if is_swapped:
            swapped_product(matrix.T, x[start:end], out[start:end])
        else:
            torch.mm(x[start:end], matrix, out=out[start:end])
    return out


def _runs(matrices: Tensor, offsets: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """(matrix, first row, row behind its last) of each run."""
    ends = offsets.tolist()
    return zip(matrices.unbind(0), ends, ends[1:], strict=False)


def takes_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own takes these operands; `weight` is [E, in, out] of any strides."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.shape[0] == 0:
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    per_16_bytes = 16 // x.element_size()
    stride_e, stride_in, stride_out = weight.stride()
    leading = stride_out if stride_in == 1 else stride_in
    return (
        x.is_contiguous()
        and 1 in (stride_in, stride_out)
        and all(n % per_16_bytes == 0 for n in (stride_e, leading, weight.shape[1], weight.shape[2]))
        and x.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
    )

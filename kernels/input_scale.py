"""Scales on what an expert reads, a vector a token: one for both halves of its first projection, or one for each.

T tokens, S routed rows, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymoe.kernels.spec import ExpertSpec

InputScale = Tensor | tuple[Tensor, Tensor]
"""[T, H] for gate and up alike, which leaves them one product; or a pair for gate and for up, which makes them two."""


def check_input_scale(hidden: Tensor, input_scale: InputScale, spec: ExpertSpec) -> None:
    """Raises ValueError where the scales do not fit the rows or the spec."""
    given = input_scale if isinstance(input_scale, tuple) else (input_scale,)
    if isinstance(input_scale, tuple) and (not spec.is_gated or len(given) != 2):
        raise ValueError(
            "input_scale is a pair, one for the gate and one for up: that needs two of them and spec.is_gated"
        )
    for scale in given:
        if scale.shape != hidden.shape or scale.device != hidden.device or not scale.is_floating_point():
            raise ValueError(
                f"input_scale must be a float tensor {tuple(hidden.shape)} [T, H] on {hidden.device} as hidden is, "
                f"got {scale.dtype} {tuple(scale.shape)} on {scale.device}"
            )


def scaled_inputs(hidden: Tensor, input_scale: InputScale | None) -> tuple[Tensor, Tensor | None]:
    """(what the experts read, what up reads if that is something else), both [T, H] in the dtype of `hidden`."""
    if input_scale is None:
        return hidden, None
    if isinstance(input_scale, Tensor):
        return (hidden * input_scale).to(hidden.dtype), None
    gate, up = ((hidden * scale).to(hidden.dtype) for scale in input_scale)
    return gate, up


def halves(x: Tensor, spec: ExpertSpec, dim: int) -> tuple[Tensor, Tensor]:
    """Views of the gate's and of up's share of a dimension of 2I."""
    if spec.is_interleaved:
        gate, up = x.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1)
    else:
        gate, up = x.chunk(2, dim)
    return gate, up


def joined(gate: Tensor, up: Tensor, spec: ExpertSpec) -> Tensor:
    """Pre-activations [S, 2I] of two products [S, I], in the order that `apply_gate` wants."""
    return torch.stack((gate, up), -1).flatten(-2) if spec.is_interleaved else torch.cat((gate, up), -1)

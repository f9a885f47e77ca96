"""What the expert MLPs of different model families differ in, and their gates in torch.  S = routed rows, I = expert width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}


@dataclass(frozen=True)
class ExpertSpec:
    """How an expert computes: ``down(act(gate) * up)`` and the variations that transformers' families have.

    Raises:
        ValueError: an unknown activation, or fields that exclude each other.
    """

    activation: str = "silu"
    """silu | gelu | gelu_tanh | relu | relu2, on the gate, or on the up projection if not gated."""
    is_gated: bool = True
    """False: only an up projection; ``gate_up`` is then [E, I, H]."""
    is_transposed: bool = False
    """Weights are [E, in, out]: ``gate_up`` [E, H, 2I], ``down`` [E, I, H]."""
    is_interleaved: bool = False
    """Gate and up alternate along the 2I axis instead of [gate; up]."""
    gate_limit: float | None = None
    """Clamp the gate to at most this, and up to [-limit, limit] (gpt-oss, DeepSeek-V4)."""
    gate_alpha: float = 1.0
    """silu becomes ``gate * sigmoid(alpha * gate)`` (gpt-oss: 1.702)."""
    up_offset: float = 0.0
    """Added to up before it is multiplied with the activated gate (gpt-oss: 1)."""
    gate_fn: Callable[[Tensor], Tensor] | None = None
    """A family's own gate [S, 2I] -> [S, I] that the fields above cannot say; torch backends only."""
    post_norm: Callable[[Tensor], Tensor] | None = None
    """Applied to [S, H] after down, before the routing weight; torch backends only."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not known; use one of {', '.join(ACTIVATIONS)}")
        if self.gate_alpha != 1.0 and self.activation != "silu":
            raise ValueError(
                f"gate_alpha is {self.gate_alpha} with activation {self.activation!r}; it only belongs to silu"
            )
        shaped = self.is_interleaved or self.gate_limit is not None or self.gate_alpha != 1.0 or self.up_offset != 0.0
        if not self.is_gated and (shaped or self.gate_fn is not None):
            raise ValueError("is_interleaved, gate_limit, gate_alpha, up_offset and gate_fn need is_gated=True")

    @property
    def gate_up_factor(self) -> int:
        """Columns the first projection makes for each column of the expert width: 2 if gated, else 1."""
        return 2 if self.is_gated else 1


def apply_gate(pre: Tensor, spec: ExpertSpec, dim: int = -1) -> Tensor:
    """Activated inner rows [S, I] of pre-activations [S, 2I] ([S, I] if not gated); differentiable, in the dtype of `pre`.

    `dim` says where the 2I stands, for pre-activations that lie otherwise.
    """
    if spec.gate_fn is not None:
        return spec.gate_fn(pre.movedim(dim, -1)).movedim(-1, dim)
    if not spec.is_gated:
        return ACTIVATIONS[spec.activation](pre)
    gate, up = (
        pre.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1) if spec.is_interleaved else pre.chunk(2, dim)
    )
    if spec.gate_limit is not None:
        gate = gate.clamp(max=spec.gate_limit)
        up = up.clamp(min=-spec.gate_limit, max=spec.gate_limit)
    if spec.up_offset:
        up = up + spec.up_offset
    if spec.gate_alpha != 1.0:
        return up * (gate * torch.sigmoid(gate * spec.gate_alpha))
    return ACTIVATIONS[spec.activation](gate) * up


def triton_refusal(spec: ExpertSpec, dtype: torch.dtype, weight_dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run this spec on rows and weights of these dtypes, or None if they can."""
    if spec.gate_fn is not None:
        return "spec.gate_fn is a Python function"
    if spec.post_norm is not None:
        return "spec.post_norm is a Python function"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {dtype} is not float32, float16 or bfloat16"
    if weight_dtype != dtype and dtype != torch.bfloat16:
        return f"with weights in {weight_dtype} it takes bfloat16 rows, not {dtype}"
    return None

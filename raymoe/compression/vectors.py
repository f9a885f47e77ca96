"""The learnt vectors of one MoE layer.  T tokens, A other experts a token, E experts, H hidden size, I expert width."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymoe.compression.split import Split
from raymoe.kernels.input_scale import InputScale
from raymoe.models import MoELayer


class Scales(NamedTuple):
    """What `moe_mlp` takes, fp32."""

    input_scale: InputScale
    """[T, H] if tied, else for gate and for up."""
    hidden_scale: Tensor
    """[T, I]."""


class Vectors(nn.Module):
    """Three vectors an expert (two if tied), fp32 whatever the model is in, each of the width of what it multiplies.

    Args:
        is_shared: one set for the whole layer.
    """

    def __init__(self, layer: MoELayer, *, tie_input: bool, is_shared: bool, device: torch.device):
        super().__init__()
        self.num_experts, self.tie_input, self.is_shared = layer.num_experts, tie_input, is_shared
        rows = 1 if is_shared else layer.num_experts
        hidden_size, inner_size = widths(layer)

        def ones(width: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(rows, width, dtype=torch.float32, device=device))

        self.gate_in = ones(hidden_size)
        """[E, H]; up reads under it too if tied."""
        self.up_in = None if tie_input else ones(hidden_size)
        """[E, H]."""
        self.inner = ones(inner_size)
        """[E, I], on the activated inner rows."""

    def forward(self, parts: Split) -> Scales:
        """Sums each token's vectors, once, by its other experts' shares; ones where it has no other expert."""
        index, shares = parts.other_index, parts.other_shares
        index = torch.zeros_like(index) if self.is_shared else index.clamp(max=self.num_experts - 1)
        gate, inner = self._sum(self.gate_in, index, shares), self._sum(self.inner, index, shares)
        if self.up_in is None:
            return Scales(gate, inner)
        return Scales((gate, self._sum(self.up_in, index, shares)), inner)

    @staticmethod
    def _sum(vectors: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        """1 + sum of share times (vector - 1): shares that sum to 1 but for rounding leave ones exactly ones."""
        return 1 + F.embedding_bag(index, vectors - 1, per_sample_weights=shares.to(vectors.dtype), mode="sum")


def widths(layer: MoELayer) -> tuple[int, int]:
    """(hidden size, expert width) of a layer."""
    shape = {field.name: field.shape for field in layer.layout.fields}["down_proj"]
    return (shape[1], shape[0]) if layer.spec.is_transposed else (shape[0], shape[1])

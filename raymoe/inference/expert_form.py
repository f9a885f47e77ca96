"""What a slot holds of an expert, and what the kernels take of it.

H hidden size, I expert width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raymoe.config.precision import Precision
from raymoe.inference.expert_precision import ExpertCodec
from raymoe.models import MoELayer, weights_of


class SlotWeights(NamedTuple):
    """One layer's view of all slots, as `raymoe.kernels.expert_rows` takes it."""

    gate_up: Tensor
    """[slots, 2I, H], or as the layer's spec says."""
    down: Tensor
    """[slots, H, I], likewise."""
    biases: tuple[Tensor, Tensor] | None
    scales: tuple[Tensor, Tensor] | None


class ExpertForm:
    """Experts in slots as flat elements of the computation's dtype; in int8 as they are stored, in a quarter of float32's bytes.

    The kernels multiply by int8 as it is, faster than by float32, so it stays in the slots and a budget holds more experts. int4
    has no products of its own: it would have to be decoded at every use, which takes longer than the product itself, so it is
    decoded once, on its way into a slot. So is int8 where biases are in it and the computation is not in float32, as they are.
    """

    def __init__(self, layers: Sequence[MoELayer], precision: Precision, dtype: torch.dtype):
        """`dtype`: of the computation."""
        self.layers, self.compute_dtype = list(layers), dtype
        has_biases = any(len(field.shape) == 1 for layer in layers for field in layer.layout.fields)
        self.is_stored = precision.kind == "int8" and (dtype == torch.float32 or not has_biases)
        """Slots hold what the precision's file holds."""
        self._codecs = [ExpertCodec(layer.layout, layer.spec, precision, torch.float32) for layer in layers]
        self.dtype = torch.uint8 if self.is_stored else dtype
        """Of a slot's elements."""
        self.numel = [
            codec.num_bytes if self.is_stored else layer.layout.numel
            for codec, layer in zip(self._codecs, layers, strict=True)
        ]
        """Elements of one expert, for each MoE layer."""
        self.num_experts = [layer.num_experts for layer in layers]

    @property
    def expert_bytes(self) -> list[int]:
        """Of one expert in a slot, for each MoE layer."""
        return [count * self.dtype.itemsize for count in self.numel]

    @property
    def native_bytes(self) -> int:
        """That all experts would take in slots in the computation's dtype: what a budget of 100 % is, in every precision."""
        return sum(self.num_experts) * max(layer.layout.numel for layer in self.layers) * self.compute_dtype.itemsize

    def weights(self, pool: Tensor) -> list[SlotWeights]:
        """Views of `pool` [slots, at least numel of the largest expert] for each MoE layer."""
        found = []
        for layer, codec, count in zip(self.layers, self._codecs, self.numel, strict=True):
            slots = pool[:, :count]
            if self.is_stored:
                gate_up, down, scales, biases = codec.int8_views(slots)
                found.append(SlotWeights(gate_up, down, biases, scales))
            else:
                gate_up, down, biases = weights_of(layer, layer.layout.views(slots))
                found.append(SlotWeights(gate_up, down, biases, None))
        return found

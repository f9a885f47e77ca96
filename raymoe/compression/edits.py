"""What a compressed layer does with a routing.  T tokens, K choices, M main experts, E experts, H hidden size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raymoe.compression.settings import PRUNES, Keep
from raymoe.compression.split import Split, demoted, split
from raymoe.compression.vectors import Vectors
from raymoe.models import MoELayer


@dataclass
class LayerEdit:
    """An `ExpertsEdit`: the main experts run, the others act as the method says."""

    layer: MoELayer
    method: str
    keep: Keep
    vectors: Vectors | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)
    """`mean_output` [E, H] or `is_pruned` bool [E], by the method."""
    by_weight: bool = True
    """See `split`."""
    absent: Callable[[Split], Tensor | None] | None = None
    """Of serving: bool [E], experts that are not to be waited for; None if there is none. They then act through their vectors."""
    demotions: Callable[[Tensor], None] | None = None
    """Told which main experts were: bool [T, M]."""

    def __call__(self, hidden: Tensor, index: Tensor, weight: Tensor, compute: Callable[..., Tensor]) -> Tensor:
        if self.method in PRUNES:
            return compute(hidden, *self._pruned(index, weight))
        if self.keep == 1.0 if isinstance(self.keep, float) else self.keep >= index.shape[1]:
            return compute(hidden, index, weight)
        parts = split(index, weight, self.layer.num_experts, self.keep, by_weight=self.by_weight)
        if self.vectors is not None:
            parts = self._at_hand(parts)
            scales = self.vectors(parts)
            return compute(
                hidden,
                parts.main_index,
                parts.main_weight,
                input_scale=scales.input_scale,
                hidden_scale=scales.hidden_scale,
            )
        main_weight = _made_up(parts) if self.method == "drop_renormalised" else parts.main_weight
        out = compute(hidden, parts.main_index, main_weight)
        return out + self._mean(parts).to(out.dtype) if self.method == "mean_vector" else out

    def _at_hand(self, parts: Split) -> Split:
        is_absent = None if self.absent is None else self.absent(parts)
        if is_absent is None:
            return parts
        parts, is_gone = demoted(parts, is_absent, self.layer.num_experts)
        if self.demotions is not None:
            self.demotions(is_gone)
        return parts

    def _mean(self, parts: Split) -> Tensor:
        """[T, H]: each other expert's mean output, with the router's own weight."""
        means = self.constants["mean_output"]
        index = parts.other_index.clamp(max=self.layer.num_experts - 1)
        return torch.nn.functional.embedding_bag(
            index, means, per_sample_weights=parts.other_weight.to(means.dtype), mode="sum"
        )

    def _pruned(self, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The routing without pruned experts; the sum of a token's weights stays where any of its experts does."""
        num_experts = self.layer.num_experts
        is_gone = torch.cat([self.constants["is_pruned"], self.constants["is_pruned"].new_ones(1)])[index]
        wide = torch.where(index < num_experts, weight.float(), 0)
        kept = torch.where(is_gone, 0, wide)
        total = kept.sum(-1, keepdim=True)
        factor = torch.where(total > 0, wide.sum(-1, keepdim=True) / total.clamp_min(1e-20), 1)
        return torch.where(is_gone, num_experts, index), (kept * factor).to(weight.dtype)


def _made_up(parts: Split) -> Tensor:
    """Main weights [T, M] that sum to what all of a token's weights did."""
    main, other = parts.main_weight.float().sum(-1, keepdim=True), parts.other_weight.float().sum(-1, keepdim=True)
    factor = torch.where(main > 0, (main + other) / main.clamp_min(1e-20), 1)
    return (parts.main_weight.float() * factor).to(parts.main_weight.dtype)

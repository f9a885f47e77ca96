"""Which of a token's experts run in full, and with what weights the others act.  T tokens, K choices, M main ones, E experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raymoe.compression.settings import ROUNDING, Keep, main_experts

_EPS = 1e-20
"""Far below any sum of fp32 router weights that means something."""


class Split(NamedTuple):
    """A routing in two parts; index E is "no expert"."""

    main_index: Tensor
    """int64 [T, M]."""
    main_weight: Tensor
    """[T, M], as the router gave them."""
    other_index: Tensor
    """int64 [T, K - m] where m is the fewest that run in full."""
    other_weight: Tensor
    """[T, K - m], as the router gave them; 0 at "no expert"."""

    @property
    def other_shares(self) -> Tensor:
        """fp32 (fp64 of fp64) [T, K - m]: `other_weight` renormalised to a sum of 1, or all 0 where there is no other expert."""
        wide = self.other_weight.to(torch.promote_types(self.other_weight.dtype, torch.float32))
        return wide / wide.sum(-1, keepdim=True).clamp_min(_EPS)


def demoted(parts: Split, is_absent: Tensor, num_experts: int) -> tuple[Split, Tensor]:
    """`parts` with main experts that are absent among the others, but for each token's strongest; and bool [T, M]: which.

    Args:
        is_absent: bool [E].
    """
    is_gone = torch.cat([is_absent, is_absent.new_zeros(1)])[parts.main_index]
    is_gone[:, 0] = False
    moved = Split(
        torch.where(is_gone, num_experts, parts.main_index),
        torch.where(is_gone, 0, parts.main_weight),
        torch.cat([parts.other_index, torch.where(is_gone, parts.main_index, num_experts)], dim=1),
        torch.cat([parts.other_weight, torch.where(is_gone, parts.main_weight, 0)], dim=1),
    )
    return moved, is_gone


def split(index: Tensor, weight: Tensor, num_experts: int, keep: Keep, *, by_weight: bool = True) -> Split:
    """Parts each token's experts: the strongest are main, of a token's |S| experts as many as `keep` says.

    Args:
        index: int64 [T, K]; `num_experts` is "no expert", wherever it stands (dynamic routing, padding).
        weight: [T, K]; whatever stands at "no expert" is not used.
        by_weight: rank by weight; False: the router's own order, for a family whose weights are not in it.
    """
    top_k = index.shape[1]
    is_real = index < num_experts
    weight = torch.where(is_real, weight, 0)
    strength = torch.where(is_real, weight.detach().float(), float("-inf")) if by_weight else is_real.float()
    order = strength.argsort(dim=-1, descending=True, stable=True)
    index, weight = torch.where(is_real, index, num_experts).gather(1, order), weight.gather(1, order)
    most = main_experts(keep, top_k)
    # of a share, a token with fewer experts has fewer main ones
    fewest = most if isinstance(keep, int) else min(1, top_k)
    taken = is_real.sum(-1, keepdim=True)
    counts = taken.clamp(max=keep) if isinstance(keep, int) else (taken.double() * keep - ROUNDING).ceil()
    is_main = torch.arange(top_k, device=index.device) < counts
    main_index = torch.where(is_main, index, num_experts)[:, :most]
    main_weight = torch.where(is_main, weight, 0)[:, :most]
    is_other = ~is_main & (index < num_experts)
    other_index = torch.where(is_other, index, num_experts)[:, fewest:]
    other_weight = torch.where(is_other, weight, 0)[:, fewest:]
    return Split(main_index, main_weight, other_index, other_weight)

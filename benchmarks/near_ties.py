"""Whether greedy tokens that differ had to: another batch rounds the last bits of bf16 logits otherwise, and a tie may fall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


class Differences(NamedTuple):
    """Requests whose tokens are not the reference's, by what they first differ in."""

    near_ties: int
    """The two tokens' logits are no further apart than rounding moves logits there."""
    others: int


class NearTies:
    """Judges tokens of a model that computes in `dtype`; keeps what it has found out.

    How far rounding moves logits is measured where tokens part: the largest difference, over the vocabulary, between the
    logits in `dtype` and those in float32. Two logits that are less than twice that apart in float32 may change places.
    """

    def __init__(self, path: Path, dtype: torch.dtype):
        self._path, self._dtype = path, dtype
        self._models: dict[torch.dtype, PreTrainedModel] = {}
        self._known: dict[tuple[tuple[int, ...], int, int], bool] = {}

    def count(
        self, prompts: Sequence[list[int]], tokens: Sequence[list[int]], reference: Sequence[list[int]]
    ) -> Differences:
        """Each request is judged by its first difference: after it the texts are not the same any more."""
        ties = others = 0
        for prompt, ours, theirs in zip(prompts, tokens, reference, strict=True):
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
            if place is None:
                continue
            if self._is_near((*prompt, *theirs[:place]), ours[place], theirs[place]):
                ties += 1
            else:
                others += 1
        return Differences(ties, others)

    def _is_near(self, context: tuple[int, ...], one: int, other: int) -> bool:
        key = context, one, other
        if key not in self._known:
            rounded, exact = self._logits(context, self._dtype), self._logits(context, torch.float32)
            moved = (rounded - exact).abs().max()
            self._known[key] = bool((exact[one] - exact[other]).abs() <= 2 * moved)
        return self._known[key]

    @torch.no_grad()
    def _logits(self, context: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype not in self._models:
            self._models[dtype] = AutoModelForCausalLM.from_pretrained(
                self._path, dtype=dtype, local_files_only=True
            ).eval()
        return self._models[dtype](torch.tensor([context])).logits[0, -1].float()

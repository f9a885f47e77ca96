"""The experts that a token took the last time it came: known for all layers before a step runs, nothing to train.

Early layers depend on the token itself more than on what stands before it. T tokens, K choices per token, L MoE layers,
E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raymoe.inference.predictors.base import RankCalibration, chosen_mask, keeps_state, sampled_rows, union

_SPREAD = 0x9E3779B1


class TokenTable:
    """Remembers the last route of each token id; how often a route comes back is learnt per layer, and so is how often an expert is
    chosen by tokens that did not take it before.

    Memory: 2 L K bytes for each of `num_slots` (24 MB for 32,768 slots, 48 layers, 8 choices); with a larger vocabulary several
    tokens share a slot, and a slot knows whose route it holds. On the CPU.
    """

    name = "token_table"

    def __init__(self, num_layers: int, num_experts: int, *, num_slots: int = 32_768):
        """Raises ValueError: a size below 1."""
        for name, value in (("num_layers", num_layers), ("num_experts", num_experts), ("num_slots", num_slots)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        self._num_layers, self._num_experts, self._num_slots = num_layers, num_experts, num_slots
        self._owner = torch.full((num_slots,), -1, dtype=torch.int64)
        self._routes: Tensor | None = None
        self._calibration: list[RankCalibration] = []
        self._ids = torch.empty(0, dtype=torch.int64)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._known = torch.empty(0, dtype=torch.bool)
        self._steps = 0

    @keeps_state
    def step_begins(self, token_ids: Tensor, requests: Sequence[str]) -> dict[int, Tensor]:
        """As `Predictor.step_begins`, for all layers, where at least one of the tokens came before."""
        self._steps += 1
        self._ids = token_ids.detach().to("cpu", torch.int64)
        self._slots = self._ids * _SPREAD % self._num_slots
        self._known = self._owner[self._slots] == self._ids
        if self._routes is None:
            return {}
        rows = sampled_rows(len(self._ids))
        rows = rows[self._known[rows]]
        if not len(rows):
            return {}
        routes = self._routes[self._slots[rows]].long()
        share = len(self._ids) / len(rows)
        # a token that never came counts as the average of those that did
        return {
            layer: union(self._calibration[layer].probability(routes[:, layer]), share)
            for layer in range(self._num_layers)
        }

    @keeps_state
    def routed(self, layer: int, hidden: Tensor, expert_index: Tensor) -> dict[int, Tensor]:
        """Only learns: what a layer chose does not change what this table says of the next."""
        index = expert_index.detach().to("cpu")
        if len(index) != len(self._ids) or not len(index):
            return {}
        if self._routes is None:
            top_k = index.shape[1]
            self._routes = torch.zeros(self._num_slots, self._num_layers, top_k, dtype=torch.int16)
            self._calibration = [RankCalibration(self._num_experts, top_k, top_k) for _ in range(self._num_layers)]
        calibration = self._calibration[layer]
        if calibration.wants(self._steps) and self._known.any():
            rows = self._known.nonzero().flatten()
            calibration.learn(
                self._routes[self._slots[rows], layer].long(), chosen_mask(index[rows], self._num_experts)
            )
        # a dropped token has no expert; the last one stands for it
        self._routes[self._slots, layer] = index.clamp(max=self._num_experts - 1).to(torch.int16)
        if layer == self._num_layers - 1:
            self._owner[self._slots] = self._ids
        return {}

    def forget(self, request: str) -> None:
        """Nothing is kept of a request."""

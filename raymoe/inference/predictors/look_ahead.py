"""Look-ahead: the next layers' own routers on what enters this one. Nothing to train.

The residual stream changes little from one layer to the next, so a later router mostly says now what it will say then
(mixtral-offloading, arXiv 2312.17238, section 3.2, one layer; HOBBIT, arXiv 2411.01433, several). How much of it is true
depends on the model, and is measured here on live traffic.

T tokens, K choices per token, E experts, M ranks, H hidden size; a distance counts MoE layers, 1 is the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raymoe.inference.predictors.base import RankCalibration, chosen_mask, num_ranks, sampled_rows, union
from raymoe.models import MoELayer, router_logits, switch

_VIEWS = ("as it is", "renormed")
_MIN_GAIN = 0.05
_RECHECK_EVERY = 64


@dataclass
class _Pair:
    """One layer seen from a distance: what each view is worth, and which is in use."""

    calibration: list[RankCalibration]
    use: int = 0
    is_worth: bool = True
    is_settled: bool = False


@dataclass
class _Pending:
    orders: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    num_tokens: int = 0


class GateLookAhead:
    """Asks the routers of the next layers. Per (layer, distance) it measures on live tokens whether the later layer's norm should
    be exchanged for this one's, keeps the better, and drops distances that the layer's most frequent experts do as well.

    What enters an MoE layer is normed with that layer's own weights: "renormed" takes them out and puts the later layer's in,
    "as it is" leaves them. Both are computed for the first `trial_tokens` tokens and again at every 64th step.

    Works on the device of the hidden states; synchronises with it only where a trial ends.
    """

    name = "look_ahead"

    def __init__(self, layers: Sequence[MoELayer], depth: int = 3, *, trial_tokens: int = 512):
        """`layers`: all MoE layers of the model; `depth`: the largest distance.

        Raises:
            ValueError: a depth below 1.
        """
        if depth < 1:
            raise ValueError(f"depth = {depth}: look-ahead needs at least 1 layer")
        self._layers, self._depth, self._trial_tokens = list(layers), depth, trial_tokens
        self._norms = [_norm_before(layer) for layer in layers]
        self._pairs = {
            (target, distance): _Pair([_calibration(self._layers[target]) for _ in _VIEWS])
            for target in range(len(self._layers))
            for distance in range(1, depth + 1)
            if distance <= target
        }
        self._frequency = [RankCalibration(layer.num_experts, layer.top_k, layer.num_experts) for layer in layers]
        self._pending: dict[int, _Pending] = {}
        self._steps = 0

    def step_begins(self, token_ids: Tensor, requests: Sequence[str]) -> dict[int, Tensor]:
        """Nothing is known yet."""
        self._pending.clear()
        self._steps += 1
        return {}

    @torch.no_grad()
    def routed(self, layer: int, hidden: Tensor, expert_index: Tensor) -> dict[int, Tensor]:
        """As `Predictor.routed`, for the next `depth` layers of this step."""
        num_tokens = len(hidden)
        if num_tokens == 0:
            return {}
        rows = sampled_rows(num_tokens, hidden.device)
        hidden = hidden[rows] if len(rows) < num_tokens else hidden
        self._learn(layer, num_tokens, expert_index[rows])
        found = {}
        for distance in range(1, self._depth + 1):
            target = layer + distance
            if target == len(self._layers):
                break
            pair = self._pairs[target, distance]
            views = self._views(pair)
            orders = {view: self._order(layer, target, view, hidden) for view in views}
            if not orders:
                continue
            pending = self._pending.setdefault(target, _Pending())
            pending.num_tokens = num_tokens
            pending.orders |= {(distance, view): order for view, order in orders.items()}
            if pair.is_worth:
                probability = pair.calibration[pair.use].probability(orders[pair.use])
                found[target] = union(probability, num_tokens / len(rows))
        return found

    def forget(self, request: str) -> None:
        """Nothing is kept of a request."""

    def report(self) -> list[dict[str, Any]]:
        """Per (layer, distance): recall among the first K of each view and of the most frequent experts, which view is in use, and
        whether the distance is."""
        return [
            {
                "layer": target,
                "distance": distance,
                **{f"recall {view}": pair.calibration[i].recall() for i, view in enumerate(_VIEWS)},
                "recall frequent": self._baseline(target),
                "view": _VIEWS[pair.use],
                "in_use": pair.is_worth,
            }
            for (target, distance), pair in sorted(self._pairs.items())
        ]

    def _views(self, pair: _Pair) -> list[int]:
        if not pair.is_settled or self._steps % _RECHECK_EVERY == 0:
            return list(range(len(_VIEWS)))
        return [pair.use] if pair.is_worth else []

    def _learn(self, layer: int, num_tokens: int, expert_index: Tensor) -> None:
        pending = self._pending.pop(layer, None)
        num_experts = self._layers[layer].num_experts
        is_due = self._frequency[layer].wants(self._steps)
        learning = {
            (distance, view): order
            for (distance, view), order in (pending.orders if pending is not None else {}).items()
            if pending is not None
            and pending.num_tokens == num_tokens
            and (is_due or len(self._views(self._pairs[layer, distance])) > 1)
        }
        if not is_due and not learning:
            return
        chosen = chosen_mask(expert_index, num_experts)
        if is_due:
            everyone = torch.arange(num_experts, device=chosen.device).expand(len(chosen), -1)
            self._frequency[layer].learn(everyone, chosen)
        for (distance, view), order in learning.items():
            self._pairs[layer, distance].calibration[view].learn(order, chosen)
        for distance in {distance for distance, _ in learning}:
            pair = self._pairs[layer, distance]
            if len(self._views(pair)) > 1:
                self._decide(layer, pair)

    def _decide(self, layer: int, pair: _Pair) -> None:
        if min(calibration.tokens for calibration in pair.calibration) < self._trial_tokens:
            return
        recall = [calibration.recall() for calibration in pair.calibration]
        pair.use = max(range(len(_VIEWS)), key=recall.__getitem__)
        pair.is_worth = recall[pair.use] >= self._baseline(layer) + _MIN_GAIN
        pair.is_settled = True

    def _baseline(self, layer: int) -> float:
        """Recall of always naming the layer's K most frequent experts."""
        frequency = self._frequency[layer].by_rank()[:-1]
        return float(frequency.topk(self._layers[layer].top_k).values.sum() / frequency.sum().clamp(min=1e-9))

    def _order(self, layer: int, target: int, view: int, hidden: Tensor) -> Tensor:
        old, new = self._norms[layer], self._norms[target]
        if view == 1 and old is not None and new is not None:
            hidden = new(_without_norm(old, hidden))
        return _router_order(self._layers[target], hidden)


def _calibration(layer: MoELayer) -> RankCalibration:
    return RankCalibration(layer.num_experts, layer.top_k, num_ranks(layer.num_experts, layer.top_k))


def _router_order(layer: MoELayer, hidden: Tensor) -> Tensor:
    """int64 [T, M]: the experts of `layer` by what its router says of hidden [T, H]: those it would choose, then by logit."""
    is_switch = switch.is_switch_router(layer.router)
    # not through the module's hooks: they belong to the tokens that are really routed
    forward: Any = layer.router.forward
    outputs = forward(hidden[None] if is_switch else hidden)
    logits = router_logits(layer, outputs).float()
    if not is_switch:
        # group limits and correction biases are in the choice, not in the logits
        lift = logits.amax() - logits.amin() + 1.0
        logits = logits.scatter_add(1, outputs[-1], lift.expand_as(outputs[-1]))
    return logits.topk(num_ranks(layer.num_experts, layer.top_k), dim=-1).indices


def _norm_before(layer: MoELayer) -> nn.Module | None:
    """The norm in front of an MoE layer, where it is one that scales by a weight."""
    block: Any = layer.block
    norm = getattr(block, "post_attention_layernorm", None)
    if norm is None and switch.is_switch_router(layer.router):
        norm = block.layer[-1].layer_norm
    return norm if isinstance(getattr(norm, "weight", None), Tensor) else None


def _without_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """What went into `norm`, up to its scale (and mean)."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    if isinstance(bias, Tensor):
        hidden = hidden - bias
    # a channel that the norm has shut says nothing about what went in
    return torch.where(weight.abs() > 1e-6, hidden / weight, torch.zeros_like(hidden))

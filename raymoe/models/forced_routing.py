"""Replace the routers' choice by one of ours, for benchmarks that need a given load; the routers stay in the gradient's way.

T tokens, K choices per token, L MoE layers, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymoe.models.layers import MoELayer, moe_layers

Choose = Callable[[int, int, int], Tensor]
"""(layer, call of that layer since forcing began, T) -> int64 [T, K], distinct experts in each row.

With activation checkpointing the backward pass calls a layer again: a choice that depends on the call then differs between the
two. Those of this module depend on layer and T alone."""


@contextmanager
def force_routing(model: PreTrainedModel, choose: Choose) -> Iterator[list[MoELayer]]:
    """While entered, every token of `model` takes the experts that `choose` says; yields the model's MoE layers.

    The weights of the chosen experts are the router's own probabilities of them, by the family's own formula, so the router
    still learns; its logits are passed on as they are.

    Raises:
        ValueError: a family whose weights follow from its own choice alone (phimoe, switch_transformers) or that is not known;
            in the forward pass, a choice of another shape or outside the experts.
    """
    family = model.config.get_text_config().model_type
    if family not in _WEIGHTS:
        raise ValueError(f"model family '{family}': its routers' choice cannot be forced; {', '.join(_WEIGHTS)} can")
    layers = moe_layers(model)
    hooks = [layer.router.register_forward_hook(_replace(layer, choose, _WEIGHTS[family])) for layer in layers]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def balanced(num_experts: int, top_k: int) -> Choose:
    """Every expert gets as many rows as every other, or one more.

    Raises:
        ValueError: fewer experts than choices.
    """
    return hot(num_experts, top_k, range(num_experts))


def hot(num_experts: int, top_k: int, experts: Sequence[int]) -> Choose:
    """All rows go to `experts`, evenly.

    Raises:
        ValueError: fewer of them than choices, one twice, or one that is none of `num_experts`.
    """
    named = torch.tensor(list(experts), dtype=torch.int64)
    if len(named) < top_k:
        raise ValueError(f"experts: got {len(named)}; a token takes {top_k} different ones")
    if len(named.unique()) < len(named) or named.min() < 0 or named.max() >= num_experts:
        raise ValueError(f"experts: got {named.tolist()}; they must be different and in [0, {num_experts})")

    @cache
    def rows(num_tokens: int) -> Tensor:
        return named[torch.arange(num_tokens * top_k).view(num_tokens, top_k) % len(named)]

    return lambda _layer, _call, num_tokens: rows(num_tokens)


def counts(loads_LE: Tensor | Sequence[Sequence[int]], top_k: int, seed: int = 0) -> Choose:
    """Rows in proportion to `loads_LE`, an integer [L, E]; tokens in an order shuffled by seed and layer.

    The largest remainders get the rows that rounding leaves. As a token takes an expert once, none gets more than T rows; what is
    over goes to the others in proportion, and evenly to experts without load where all others are full.

    Raises:
        ValueError: not two-dimensional, negative loads, or fewer experts than choices; in the forward pass, more layers than L.
    """
    loads = torch.as_tensor(loads_LE).cpu()
    if loads.ndim != 2 or loads.is_floating_point():
        raise ValueError(f"loads: got {loads.dtype} {list(loads.shape)}; give integers [layers, experts]")
    if loads.numel() and loads.min() < 0:
        raise ValueError(f"loads: got {int(loads.min())}; a load is at least 0")
    if loads.shape[1] < top_k:
        raise ValueError(f"loads: {loads.shape[1]} experts; a token takes {top_k} different ones")

    @cache
    def rows(layer: int, num_tokens: int) -> Tensor:
        if layer >= len(loads):
            raise ValueError(f"loads: {len(loads)} layers, but the model has a layer {layer}")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        order_E = torch.randperm(loads.shape[1], generator=generator)
        taken_E = _rows_of(loads[layer].long(), num_tokens, top_k)
        # an expert's rows are neighbours and at most T, so dealing them out token by token gives none two of them
        dealt = order_E.repeat_interleave(taken_E[order_E]).view(top_k, num_tokens).T
        return dealt[torch.randperm(num_tokens, generator=generator)].contiguous()

    return lambda layer, _call, num_tokens: rows(layer, num_tokens)


def _rows_of(load_E: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """int64 [E] with sum T * K and none over T."""
    taken_E = torch.zeros_like(load_E)
    is_open_E = torch.ones_like(load_E, dtype=torch.bool)
    while True:
        left = num_tokens * top_k - int(taken_E[~is_open_E].sum())
        weight_E = load_E * is_open_E
        if weight_E.sum() == 0:
            weight_E = is_open_E.long()
        share_E = _largest_remainder(weight_E, left)
        is_over_E = is_open_E & (share_E > num_tokens)
        if not is_over_E.any():
            return torch.where(is_open_E, share_E, taken_E)
        taken_E[is_over_E] = num_tokens
        is_open_E &= ~is_over_E


def _largest_remainder(weight_E: Tensor, num_rows: int) -> Tensor:
    total = max(int(weight_E.sum()), 1)
    share_E = weight_E * num_rows // total
    remainder_E = weight_E * num_rows % total
    first = remainder_E.argsort(descending=True, stable=True)[: num_rows - int(share_E.sum())]
    share_E[first] += 1
    return share_E


def _replace(layer: MoELayer, choose: Choose, weights_of: Callable[[Any, Tensor, Tensor], Tensor]):
    calls = 0

    def hook(router: nn.Module, _inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal calls
        logits, weights, indices = outputs
        chosen = choose(layer.index, calls, len(indices)).to(indices.device)
        calls += 1
        if chosen.shape != indices.shape or chosen.dtype != torch.int64:
            raise ValueError(
                f"{layer.name}: the forced choice is {chosen.dtype} {list(chosen.shape)}; int64 {list(indices.shape)} is wanted"
            )
        return logits, weights_of(router, logits, chosen).to(weights.dtype), chosen

    return hook


def _normalised(_router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
    probability = logits.softmax(-1, dtype=torch.float32).gather(1, chosen)
    return probability / probability.sum(-1, keepdim=True)


def _as_configured(router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
    if router.norm_topk_prob:
        return _normalised(router, logits, chosen)
    return logits.softmax(-1, dtype=torch.float32).gather(1, chosen)


def _scaled(router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.float32).gather(1, chosen) * router.routed_scaling_factor


def _sigmoid(router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
    score = logits.sigmoid().gather(1, chosen)
    if router.norm_topk_prob:
        score = score / (score.sum(-1, keepdim=True) + 1e-20)
    return score * router.routed_scaling_factor


def _among_chosen(_router: Any, logits: Tensor, chosen: Tensor) -> Tensor:
    return logits.gather(1, chosen).softmax(-1)


# the formulas of transformers' routers, with the choice taken out
_WEIGHTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "mixtral": _normalised,
    "olmoe": _as_configured,
    "qwen2_moe": _as_configured,
    "qwen3_moe": _as_configured,
    "deepseek_v2": _scaled,
    "deepseek_v3": _sigmoid,
    "gpt_oss": _among_chosen,
}

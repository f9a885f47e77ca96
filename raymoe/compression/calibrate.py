"""What can be measured of a model's experts without training.  E experts, H hidden size, T tokens, K choices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.models import ExpertsEdit, MoELayer, expert_parameters, moe_layers, set_edit

_AT_ONCE = 8


def mean_outputs(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """{layer: fp32 [E, H]}: each expert's mean output over the rows that the router gave it; 0 where it got none.

    Source: MoNE (arXiv 2507.00390), whose pruned experts answer it.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def note(layer: MoELayer, expert: Tensor, weight: Tensor, rows: Tensor) -> None:
        total = sums.setdefault(layer.name, rows.new_zeros(layer.num_experts, rows.shape[1], dtype=torch.float32))
        total.index_add_(0, expert, rows.float())
        count = counts.setdefault(layer.name, total.new_zeros(layer.num_experts))
        count.index_add_(0, expert, torch.ones_like(weight))

    _run(model, tokens, note)
    return {name: total / counts[name].clamp_min(1)[:, None] for name, total in sums.items()}


def expert_scores(model: PreTrainedModel, method: str, tokens: Tensor | None) -> dict[str, Tensor]:
    """{layer: fp32 [E]}, more is worth more: the norm of an expert's weights ("magnitude"), or the mean of gate times norm of
    the output over the rows that it got ("reap"; arXiv 2510.13999, section 3)."""
    if method == "magnitude":
        return {
            layer.name: torch.stack([p.float().flatten(1).square().sum(1) for p in expert_parameters(layer).values()])
            .sum(0)
            .sqrt()
            for layer in moe_layers(model)
        }
    assert tokens is not None
    sums: dict[str, Tensor] = {}

    def note(layer: MoELayer, expert: Tensor, weight: Tensor, rows: Tensor) -> None:
        found = sums.setdefault(layer.name, weight.new_zeros(2, layer.num_experts))
        found[0].index_add_(0, expert, weight * rows.float().norm(dim=-1))
        found[1].index_add_(0, expert, torch.ones_like(weight))

    _run(model, tokens, note)
    return {name: total / count.clamp_min(1) for name, (total, count) in sums.items()}


@torch.no_grad()
def _run(model: PreTrainedModel, tokens: Tensor, note: Callable[[MoELayer, Tensor, Tensor, Tensor], None]) -> None:
    """Runs the full model over tokens [N, L]; `note` gets a layer's routed (expert [R], weight [R], its output [R, H])."""

    def watching(layer: MoELayer) -> ExpertsEdit:
        def edit(hidden: Tensor, index: Tensor, weight: Tensor, compute: Callable[..., Tensor]) -> Tensor:
            # a row for each choice: an expert's own answer is what compute gives with a weight of one
            token, choice = (index < layer.num_experts).nonzero(as_tuple=True)
            expert = index[token, choice]
            one = torch.ones(len(token), 1, device=hidden.device, dtype=torch.float32)
            rows = compute(hidden[token], expert[:, None], one)
            note(layer, expert, weight[token, choice].float(), rows)
            return compute(hidden, index, weight)

        return edit

    # whoever calls has put its own edits on, and they go back
    before = {
        layer.name: layer.experts.__dict__["_raymoe_edit"]
        for layer in moe_layers(model)
        if "_raymoe_edit" in layer.experts.__dict__
    }
    was_training = model.training
    model.eval()
    set_edit(model, {layer.name: watching(layer) for layer in moe_layers(model)})
    try:
        for batch in tokens.split(_AT_ONCE):
            model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        set_edit(model, before)
        model.train(was_training)

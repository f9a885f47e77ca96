"""Train a compression: its vectors alone, or the model with them; against text, or against the full model's answers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymoe.compression.attach import as_full, detach, is_vector, state_of, theta_parameters
from raymoe.models import expert_parameter_names, moe_layers

TRAIN = ("theta", "theta+main", "all")
LOSSES = ("lm", "distill")


def fit(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    train: str = "theta",
    loss: str = "lm",
    steps: int = 200,
    batch: int = 8,
    learning_rate: float = 1e-2,
    weight_learning_rate: float = 2e-5,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> list[float]:
    """Trains a compressed model in place with AdamW under a cosine schedule, and returns the loss of each step, in nats a token.

    With one other expert a token its share is 1 whatever the router says, and with vectors all alike (as at the beginning) it
    says nothing for any number: the router then learns through the main experts' weights alone.

    Args:
        tokens: int64 [N, L], N sequences of text.
        train: "theta": the vectors; "theta+main": experts and routers too; "all".
        loss: "lm": next token; "distill": KL divergence from the full model's distribution, as it was when `fit` was called.
        learning_rate: of the vectors; `weight_learning_rate`: of everything else (the paper's, for OLMoE).
        progress: called after each step with its loss.

    Raises:
        ValueError: an unknown train or loss, nothing to train (a method without vectors, with train="theta"), or no text.

    Source: arXiv 2503.00634, section 4, which trains "all" with "lm"; "theta" and "distill" are ours.
    """
    if train not in TRAIN:
        raise ValueError(f"train: {train!r} is not known; use one of {', '.join(TRAIN)}")
    if loss not in LOSSES:
        raise ValueError(f"loss: {loss!r} is not known; use one of {', '.join(LOSSES)}")
    if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] < 2 or steps < 1:
        raise ValueError(
            f"tokens: got {tuple(tokens.shape)} for {steps} steps; give sequences [N, L] of at least two tokens"
        )
    vectors, others = _trained(model, train)
    if not vectors and not others:
        raise ValueError(
            f"train: method {state_of(model).settings.method!r} has no vectors; use theta+main or all, or no fit"
        )
    teacher = _teacher(model, bool(others)) if loss == "distill" else None
    _keep_originals(model, others)
    groups = [
        {"params": list(vectors.values()), "lr": learning_rate},
        {"params": list(others.values()), "lr": weight_learning_rate},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    was_training = model.training
    wanted = {id(p) for p in (*vectors.values(), *others.values())}
    frozen = [p for p in model.parameters() if id(p) not in wanted and p.requires_grad]
    losses = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.train()
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat(
            [torch.randperm(len(tokens), generator=generator) for _ in range(-(-steps * batch // len(tokens)))]
        )
        for step in range(steps):
            rows = tokens[order[step * batch : (step + 1) * batch]].to(model.device)
            value = _loss(model, teacher, rows)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            schedule.step()
            losses.append(value.item())
            if progress is not None:
                progress(losses[-1])
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        model.train(was_training)
    return losses


def _loss(model: PreTrainedModel, teacher: Callable[[Tensor], Tensor] | None, rows: Tensor) -> Tensor:
    wanted = None if teacher is None else teacher(rows[:, :-1])
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float().flatten(0, 1)
    if wanted is None:
        return F.cross_entropy(logits, rows[:, 1:].flatten())
    return F.kl_div(logits.log_softmax(-1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)


def _trained(model: PreTrainedModel, train: str) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(vectors, other parameters) that are to be trained."""
    vectors = theta_parameters(model)
    if train == "theta":
        return vectors, {}
    named = {name: p for name, p in model.named_parameters() if not is_vector(name)}
    if train == "all":
        return vectors, named
    layers = moe_layers(model)
    routers = {id(p) for layer in layers for p in layer.router.parameters()}
    experts = expert_parameter_names(layers)
    return vectors, {name: p for name, p in named.items() if name in experts or id(p) in routers}


def _teacher(model: PreTrainedModel, weights_change: bool) -> Callable[[Tensor], Tensor]:
    """Log-probabilities of the full model: a copy of it where its weights are about to change."""
    full = None
    if weights_change:
        full = copy.deepcopy(model)
        detach(full)
        full.requires_grad_(False).eval()

    @torch.no_grad()
    def answer(rows: Tensor) -> Tensor:
        if full is not None:
            return full(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
        was_training = model.training
        model.eval()
        try:
            with as_full(model):
                return model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
        finally:
            model.train(was_training)

    return answer


def _keep_originals(model: PreTrainedModel, parameters: dict[str, nn.Parameter]) -> None:
    """So that `restore` loses nothing."""
    originals = state_of(model).originals
    for name, parameter in parameters.items():
        if name not in originals:
            originals[name] = parameter.detach().to("cpu", copy=True)

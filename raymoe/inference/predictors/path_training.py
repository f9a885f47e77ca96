"""Train a routing-path predictor on routes that the model really took, and say how good it is on held-out sequences.

Loss and optimiser are ExpertFlow's (its released code, as our fact sheet has them): binary cross entropy summed over experts and
averaged over the (token, layer) rows that have a label; AdamW with the head's rate ten times the rest's, weight decay 1e-4,
linear warm-up and decay; one sequence in ten held out. Prompt and answer are two parts of a real text, cut at random.

N sequences, n tokens each, K choices per token, L MoE layers, E experts; B sequences a step, S decoded tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.inference.predictors.base import chosen_mask
from raymoe.inference.predictors.path_model import PathNetwork, PathShape

_HELD_OUT_EVERY = 10
_WEIGHT_DECAY = 1e-4
_REST_OF_RATE = 0.1
_WARM_UP = 0.1
_TOGETHER = 4


@dataclass(frozen=True, eq=False)
class RecordedRoutes:
    """What the model did with its tokens.

    Raises:
        ValueError: tensors that do not belong together.
    """

    tokens: Tensor
    """int64 [N, n]."""
    experts: Tensor
    """int16 [N, n, L, K]; E is no expert."""

    def __post_init__(self):
        if self.experts.ndim != 4 or self.experts.shape[:2] != self.tokens.shape:
            raise ValueError(
                f"experts {list(self.experts.shape)} must be [N, n, L, K] for tokens [N, n] = {list(self.tokens.shape)}"
            )

    def split(self) -> tuple["RecordedRoutes", "RecordedRoutes"]:
        """To train on, and every tenth to hold out (of fewer than ten, the last).

        Raises:
            ValueError: fewer than two sequences.
        """
        count = len(self.tokens)
        if count < 2:
            raise ValueError(f"{count} sequence(s): training needs at least 2, as one is held out. Give more text.")
        held = torch.arange(count) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        held[-1] |= not held.any()
        return RecordedRoutes(self.tokens[~held], self.experts[~held]), RecordedRoutes(
            self.tokens[held], self.experts[held]
        )


def path_loss(logits: Tensor, experts: Tensor) -> Tensor:
    """logits [B, S, L, E], experts int [B, S, L, K] where E is no expert -> scalar; rows without any expert have no label."""
    num_experts = logits.shape[-1]
    rows = logits.reshape(-1, num_experts)
    index = experts.reshape(len(rows), -1).long()
    labels = chosen_mask(index, num_experts)
    has_label = labels.any(-1)
    each = F.binary_cross_entropy_with_logits(rows, labels.to(rows.dtype), reduction="none").sum(-1)
    return (each * has_label).sum() / has_label.sum().clamp(min=1)


def train_path_network(
    routes: RecordedRoutes,
    shape: PathShape,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> PathNetwork:
    """A trained network in eval mode; the same arguments give the same one on the same machine.

    Args:
        learning_rate: of the head; the rest has a tenth of it.
        on_step: told (step from 0, loss).

    Raises:
        ValueError: sequences of fewer than two tokens, or a loss that is no number.
    """
    num_tokens = routes.tokens.shape[1]
    if num_tokens < 2:
        raise ValueError(f"sequences of {num_tokens} token(s): a prompt and an answer need at least 2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PathNetwork(shape).train()
        head = list(network.head.parameters())
        optimizer = torch.optim.AdamW(
            [
                {"params": head, "lr": learning_rate},
                {"params": list(network.t5.parameters()), "lr": learning_rate * _REST_OF_RATE},
            ],
            weight_decay=_WEIGHT_DECAY,
        )
        warm_up = max(1, round(steps * _WARM_UP))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1))
        )
        for step in range(steps):
            picked = torch.randint(len(routes.tokens), (batch,))
            cut = int(torch.randint(1, num_tokens, ()))
            prompt, decoded = _parts(routes.tokens[picked], cut, shape)
            loss = path_loss(network(prompt, decoded), routes.experts[picked, cut : cut + decoded.shape[1]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"learning_rate = {learning_rate}: the loss is {value} at step {step}; lower it")
            on_step(step, value)
    return network.eval()


@torch.no_grad()
def evaluate_path_network(
    network: PathNetwork, routes: RecordedRoutes, *, expert_bytes: list[int], batch: int = 16
) -> list[dict[str, Any]]:
    """Quality on held-out sequences, cut in the middle: a row for single tokens, and one for the union of four sequences' tokens at
    the same position where there are four.

    Each row has recall, precision and byte_recall @k, @1.5k and @2k, where k is how many experts are truly wanted (of a token its
    K), and as many of largest probability count as named; byte_recall weighs layers by the bytes of an expert.

    Args:
        expert_bytes: of an expert of each layer.
    """
    said = []
    for start in range(0, len(routes.tokens), batch):
        prompt, decoded = _parts(routes.tokens[start : start + batch], _middle(routes), network.shape)
        said.append(network(prompt, decoded).sigmoid())
    return _rows(torch.cat(said), routes, network.shape, expert_bytes)


def evaluate_most_frequent(
    train: RecordedRoutes, held: RecordedRoutes, shape: PathShape, *, expert_bytes: list[int]
) -> list[dict[str, Any]]:
    """The rows of `evaluate_path_network` for naming each layer's most frequent experts, whatever the token: the least that a
    predictor must beat."""
    index = train.experts.long().flatten(0, 1)
    share = torch.stack(
        [chosen_mask(index[:, layer], shape.num_experts).float().mean(0) for layer in range(shape.num_layers)]
    )
    _, decoded = _parts(held.tokens, _middle(held), shape)
    return _rows(share.expand(*decoded.shape, -1, -1), held, shape, expert_bytes)


def _rows(said: Tensor, routes: RecordedRoutes, shape: PathShape, expert_bytes: list[int]) -> list[dict[str, Any]]:
    """said: probability float32 [N, S, L, E] of the tokens from the middle on."""
    cut = _middle(routes)
    experts = routes.experts[:, cut : cut + said.shape[1]].long()
    true = chosen_mask(experts.flatten(0, 2), shape.num_experts).view(said.shape)
    rows = [_row(1, said, true, expert_bytes)]
    groups = len(said) // _TOGETHER
    if groups:
        said, true = (each[: groups * _TOGETHER].unflatten(0, (groups, _TOGETHER)) for each in (said, true))
        rows.append(_row(_TOGETHER, 1.0 - (1.0 - said).prod(1), true.any(1), expert_bytes))
    return rows


def _middle(routes: RecordedRoutes) -> int:
    return max(1, routes.tokens.shape[1] // 2)


def _row(tokens: int, said: Tensor, true: Tensor, expert_bytes: list[int]) -> dict[str, Any]:
    wanted = true.sum(-1, keepdim=True)
    rank = said.argsort(-1, descending=True).argsort(-1)
    weight = torch.tensor(expert_bytes, dtype=torch.float64)[:, None]
    row: dict[str, Any] = {"tokens": tokens, "wanted": wanted.float().mean().item()}
    for name, factor in (("k", 1.0), ("1.5k", 1.5), ("2k", 2.0)):
        named = rank < (wanted * factor).ceil()
        hits = (named & true).sum().item()
        row[f"recall@{name}"] = hits / max(wanted.sum().item(), 1)
        row[f"precision@{name}"] = hits / max(named.sum().item(), 1)
        row[f"byte_recall@{name}"] = (((named & true) * weight).sum() / (true * weight).sum().clamp(min=1)).item()
    return row


def _parts(tokens: Tensor, cut: int, shape: PathShape) -> tuple[Tensor, Tensor]:
    """The prompt before `cut` and what is decoded from there, as far as the network reads."""
    return tokens[:, max(0, cut - shape.prompt_tokens) : cut], tokens[:, cut : cut + shape.window]

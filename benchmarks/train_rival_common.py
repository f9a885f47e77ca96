"""What every training rival is given alike: the loss, the routing, and the words between its processes and their group.

L MoE layers, T tokens of a rank, K choices a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.benchmarks.train_workload import TrainWorkload
from raymoe.models.forced_routing import force_routing

Step = Callable[[Tensor, Tensor], float]
"""One optimizer step of a rank: tokens int64 [b, n + 1], experts of every token int64 [L, T, K] -> its mean loss, nats a token."""


@dataclass(frozen=True)
class Start:
    """The first thing a rank is sent."""

    module: str
    """Holds ``build(workload, rank, workers, **options)``."""
    options: dict[str, Any]
    packages: tuple[str, ...]
    """Whose versions to report."""
    workload: TrainWorkload
    timeout_s: float


@dataclass(frozen=True)
class Steps:
    """Run the steps [first, first + count) under a load."""

    load: str
    first: int
    count: int


@dataclass(frozen=True)
class Done:
    """What a rank answers: its steps' seconds and mean losses, or what went wrong; to `Start`, versions by package."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None


class GivenRouting:
    """Takes the choice of experts away from a transformers model's routers for good; the weights stay the routers' own.

    Set `choices`, int64 [L, T, K], before every step.
    """

    def __init__(self, model: PreTrainedModel):
        self.choices = torch.empty(0)
        # kept, as the hooks go with it
        self._forced = force_routing(model, lambda layer, _call, _num_tokens: self.choices[layer])
        self._forced.__enter__()


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats, fp32, as transformers' own models compute it. logits [b, n, V], targets int64 [b, n]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

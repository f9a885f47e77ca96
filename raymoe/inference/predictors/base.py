"""What every predictor of experts is asked, and what they share: unions over tokens, and probabilities learnt by rank.

T tokens of a step, K choices per token, L MoE layers, E experts, M ranks that a predictor tells apart, H hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

MAX_ROWS = 64
"""Tokens of a step that are looked at: a step that reads prompts has hundreds, which say nothing that these do not."""

_PRIOR_ROWS = 8.0
_EAGER_TOKENS = 2048.0
_SPARE_STEPS = 8
_ALMOST_ONE = 1.0 - 1e-6


F = TypeVar("F", bound=Callable[..., Any])


def keeps_state(method: F) -> F:
    """For methods that write tensors they keep: an engine may call them in inference mode or not, and what was made in that mode
    could not be written outside it."""
    return cast(F, torch.inference_mode(False)(torch.no_grad()(method)))


class Predictor(Protocol):
    """Says which experts later layers will want. Only moves bytes: a wrong answer costs time, never a token.

    One thread calls it, in the order of the steps: `step_begins`, then `routed` once a layer. Answers are
    {layer: float32 [E]}, the probability that at least one of the step's tokens will want the expert on that layer's next
    visit; a later answer for a layer replaces an earlier one. Layers are indices of `raymoe.models.MoELayer`.
    """

    name: str

    def step_begins(self, token_ids: Tensor, requests: Sequence[str]) -> dict[int, Tensor]:
        """Before layer 0 runs: token_ids int64 [T] that enter the step, and the request of each, those of one request together and
        in order."""
        ...

    def routed(self, layer: int, hidden: Tensor, expert_index: Tensor) -> dict[int, Tensor]:
        """Once the router of a layer has decided: hidden [T, H] that entered the MoE layer, after its norm; expert_index int64
        [T, K], where E is no expert."""
        ...

    def forget(self, request: str) -> None:
        """A request is over; one that was never seen is ignored."""
        ...


def sampled_rows(num_rows: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [min(T, MAX_ROWS)], evenly spread and the same for every layer of a step."""
    count = min(num_rows, MAX_ROWS)
    return torch.arange(count, device=device) * num_rows // max(count, 1)


def chosen_mask(expert_index: Tensor, num_experts: int) -> Tensor:
    """bool [T, E]: what each token chose, from int64 [T, K] where E is no expert."""
    mask = torch.zeros(len(expert_index), num_experts + 1, dtype=torch.bool, device=expert_index.device)
    return mask.scatter_(1, expert_index, True)[:, :num_experts]


def union(probability: Tensor, share: float = 1.0) -> Tensor:
    """float32 [..., E]: that at least one of the tokens wants an expert, if they choose independently: 1 - prod(1 - p).

    Args:
        probability: float32 [..., T, E] of each token.
        share: by which the tokens at hand stand for more: tokens of the step / T.
    """
    none = torch.log1p(-probability.clamp(0.0, _ALMOST_ONE)).sum(-2)
    return -torch.expm1(none * share)


class RankCalibration:
    """How often the expert at each rank of a predictor's order was really chosen: learnt online, older tokens counting less.

    Turns orders into probabilities, so that what a predictor says means the same whatever its scores are. Its memory is
    4 (M + 1) bytes.
    """

    def __init__(self, num_experts: int, top_k: int, num_ranks: int, *, half_life: float = 8192.0):
        """`half_life`: tokens after which one counts half."""
        self._num_experts, self._top_k, self._half_life = num_experts, top_k, half_life
        self._rest = max(num_experts - num_ranks, 0)
        # before anything is known every expert is as likely as any other
        self._prior = torch.full((num_ranks + 1,), top_k / num_experts)
        self._prior[-1] *= self._rest
        self._hits = torch.zeros(num_ranks + 1)
        self._tokens = 0.0
        self._by_rank: Tensor | None = None

    @property
    def tokens(self) -> float:
        """Learnt from, older ones counting less."""
        return self._tokens

    def learn(self, order: Tensor, chosen: Tensor) -> None:
        """order: int64 [T, M], experts by rank; chosen: bool [T, E], what they were followed by."""
        ranked = chosen.gather(1, order).sum(0, dtype=torch.float32)
        rest = (chosen.sum(dtype=torch.float32) - ranked.sum())[None]
        keep = 0.5 ** (len(order) / self._half_life)
        self._hits = self._hits.to(order.device) * keep + torch.cat([ranked, rest])
        self._tokens = self._tokens * keep + len(order)
        self._by_rank = None

    def wants(self, step: int) -> bool:
        """Whether it is worth learning at this step: once much is known, every 8th step keeps it up to date."""
        return self._tokens < _EAGER_TOKENS or step % _SPARE_STEPS == 0

    def by_rank(self) -> Tensor:
        """float32 [M + 1]: the probability at each rank, and of each expert past them."""
        if self._by_rank is not None:
            return self._by_rank
        prior = self._prior.to(self._hits.device)
        probability = (self._hits + _PRIOR_ROWS * prior) / (self._tokens + _PRIOR_ROWS)
        probability[-1] /= max(self._rest, 1)
        self._by_rank = probability = probability.clamp(0.0, 1.0)
        return probability

    def probability(self, order: Tensor) -> Tensor:
        """float32 [T, E] from an order int64 [T, M]."""
        by_rank = self.by_rank().to(order.device)
        spread = by_rank[-1].repeat(len(order), self._num_experts)
        return spread.scatter_(1, order, by_rank[:-1].expand_as(order))

    def recall(self) -> float:
        """Of what was chosen, the share among the first K ranks; a host synchronisation on a GPU. 0 before anything is learnt."""
        return float(self._hits[: self._top_k].sum() / self._hits.sum().clamp(min=1e-9))


def num_ranks(num_experts: int, top_k: int) -> int:
    """How many ranks are worth telling apart."""
    return min(num_experts, max(4 * top_k, 8))

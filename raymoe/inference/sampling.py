"""How a request's next token is drawn: by its own parameters, with a random number that depends on nothing but it.

R rows of logits, one a request that gets a token; V vocabulary.
"""

import torch
from torch import Tensor

from raymoe.inference.requests import SamplingParams, TokenLogprobs

_MASK_64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a request's token at `position`: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of both."""
    # 52 bits: times a total it still rounds to less than the total
    return (_mix(_mix(seed & _MASK_64) + position) >> 12) / (1 << 52)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def sample(logits: Tensor, params: list[SamplingParams], draws: list[float]) -> Tensor:
    """Draws one token a row.

    The draw inverts the cumulative distribution in vocabulary order, so a last-bit difference in a logit (another batch,
    another kernel) moves the outcome only if the draw falls within that distance of a boundary.

    Args:
        logits: [R, V] float32; not changed.
        params: of each row; greedy ones give the argmax.
        draws: a number in [0, 1) for each row.

    Returns:
        int64 [R].
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, asked in enumerate(params) if not asked.is_greedy]
    if not drawn:
        return tokens

    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)[:, None]

    asked = [params[row] for row in drawn]
    rows = torch.tensor(drawn, device=logits.device)
    scores = logits[rows].double() / column([p.temperature for p in asked], torch.float64)
    if any(p.top_k or p.top_p < 1.0 for p in asked):
        top_k = column([p.top_k or logits.shape[-1] for p in asked], torch.int64)
        top_p = column([p.top_p for p in asked], torch.float64)
        scores = _keep_likeliest(scores, top_k, top_p)
    ends = scores.softmax(dim=-1).cumsum(dim=-1)
    target = column([draws[row] for row in drawn], torch.float64) * ends[:, -1:]
    # right=True steps over tokens of probability zero; the clamp is for logits that are not numbers, where none is right
    tokens[rows] = torch.searchsorted(ends, target, right=True).flatten().clamp(max=logits.shape[-1] - 1)
    return tokens


def log_probabilities(logits: Tensor, tokens: Tensor, top: list[int]) -> list[TokenLogprobs]:
    """What the model thought of the tokens that were drawn.

    Args:
        logits: [R, V] float32, as the model gave them.
        tokens: int64 [R].
        top: how many of the likeliest tokens to tell, for each row.
    """
    logprobs = logits.log_softmax(dim=-1)
    drawn = logprobs.gather(1, tokens[:, None]).flatten().tolist()
    likeliest = logprobs.topk(min(max(top), logits.shape[-1]), dim=-1)
    rows = zip(tokens.tolist(), drawn, likeliest.indices.tolist(), likeliest.values.tolist(), top, strict=True)
    return [
        TokenLogprobs(token, logprob, list(zip(best[:num], values[:num], strict=True)))
        for token, logprob, best, values, num in rows
    ]


def _keep_likeliest(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Masks all but the `top_k` likeliest of each row, and of those all but the fewest that reach `top_p` together."""
    descending, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    descending = descending.masked_fill(rank >= top_k, -torch.inf)
    probability = descending.softmax(dim=-1)
    # the token that crosses top_p still belongs to them
    before = probability.cumsum(dim=-1) - probability
    descending = descending.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(scores).scatter_(-1, order, descending)

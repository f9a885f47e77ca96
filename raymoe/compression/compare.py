"""What a compression costs and saves, each apart: quality, parameters, operations, bytes, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.compression.attach import as_dropped, as_full, settings_of
from raymoe.compression.counts import Counts, active_counts

NOT_MEASURABLE = 3.0
"""A gap of fewer standard errors than this is noise, and no share of it is claimed."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """Of a compressed model with the full one and with one whose other experts do nothing. Losses are nats a token, held out."""

    full_loss: float
    dropped_loss: float
    loss: float
    gap: float
    """dropped_loss - full_loss."""
    gap_standard_error: float
    norm: float
    """full_loss / loss: 1 is as good as in full."""
    gap_closed: float | None
    """(dropped_loss - loss) / gap; None where the gap is not measurable here."""
    ci_low: float | None
    ci_high: float | None
    """95 %, paired bootstrap over sequences."""
    full_counts: Counts
    counts: Counts
    latency_ms: dict[int, tuple[float, float, float]]
    """{sequences of one token each: median (full, dropped, compressed) of interleaved forward passes}."""


def compare(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    full: PreTrainedModel | None = None,
    dropped: PreTrainedModel | None = None,
    batches: tuple[int, ...] = (1, 16),
    rounds: int = 20,
    seed: int = 0,
) -> Comparison:
    """Compares a compressed model on held-out text.

    Args:
        tokens: int64 [N, L], which no model has been fitted on.
        full: what counts as the full model, e.g. one trained as long; default: this one's weights with all experts.
        dropped: likewise for the dropped one.
        batches: of which the latency is measured; of none if empty.

    Raises:
        ValueError: the model is not compressed, or fewer than two sequences.
    """
    settings = settings_of(model)
    if tokens.ndim != 2 or len(tokens) < 2:
        raise ValueError(f"tokens: got {tuple(tokens.shape)}; give at least two sequences [N, L]")
    arms: list[tuple[PreTrainedModel, Callable[[], AbstractContextManager]]] = [
        (full or model, nullcontext if full is not None else lambda: as_full(model)),
        (dropped or model, nullcontext if dropped is not None else lambda: as_dropped(model)),
        (model, nullcontext),
    ]
    losses = []
    for arm, mode in arms:
        with mode():
            losses.append(sequence_losses(arm, tokens))
    share, low, high = gap_closed(*losses, seed=seed)
    full_loss, dropped_loss, loss = (x.mean().item() for x in losses)
    return Comparison(
        full_loss,
        dropped_loss,
        loss,
        dropped_loss - full_loss,
        standard_error(losses[1] - losses[0]),
        full_loss / loss,
        share,
        low,
        high,
        active_counts(model),
        active_counts(model, settings),
        {batch: _latency_ms(arms, tokens, batch, rounds) for batch in batches},
    )


@torch.no_grad()
def sequence_losses(model: PreTrainedModel, tokens: Tensor, at_once: int = 8) -> Tensor:
    """fp64 [N]: mean cross entropy of each sequence of tokens [N, L], in nats a token."""
    was_training = model.training
    model.eval()
    found = []
    for rows in tokens.split(at_once):
        rows = rows.to(model.device)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        found.append(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").double().mean(1).cpu())
    model.train(was_training)
    return torch.cat(found)


def gap_closed(
    full: Tensor, dropped: Tensor, compressed: Tensor, *, seed: int = 0
) -> tuple[float | None, float | None, float | None]:
    """(share of the gap between dropping and full that is closed, its 95 % interval), from paired losses [N]; None in noise."""
    gaps = dropped - full
    if gaps.mean() < NOT_MEASURABLE * standard_error(gaps):
        return None, None, None
    closed = dropped - compressed
    draws = torch.randint(len(gaps), (_RESAMPLES, len(gaps)), generator=torch.Generator().manual_seed(seed))
    shares = closed[draws].mean(1) / gaps[draws].mean(1)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=shares.dtype)).tolist()
    return (closed.mean() / gaps.mean()).item(), low, high


def standard_error(x: Tensor) -> float:
    """Of the mean of [N]."""
    return (x.std() / len(x) ** 0.5).item()


@torch.no_grad()
def _latency_ms(
    arms: list[tuple[PreTrainedModel, Callable[[], AbstractContextManager]]], tokens: Tensor, batch: int, rounds: int
) -> tuple[float, float, float]:
    """Median time of a pass over `batch` sequences of one token, the arms taking turns."""
    rows = tokens.flatten()[:batch, None]
    times: list[list[float]] = [[] for _ in arms]
    for number in range(rounds + 2):
        for (arm, mode), mine in zip(arms, times, strict=True):
            here = rows.to(arm.device)
            with mode():
                _settle(arm.device)
                began_s = time.perf_counter()
                arm(input_ids=here, use_cache=False)
                _settle(arm.device)
                # the first ones warm up
                if number >= 2:
                    mine.append(1e3 * (time.perf_counter() - began_s))
    full, dropped, compressed = (statistics.median(mine) for mine in times)
    return full, dropped, compressed


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""How a family reads a training sequence: what goes in, what is to be predicted. B sequences of n + 1 tokens."""

from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from raymoe.models import MoELayer
from raymoe.training.batches import Batch


class Prediction(NamedTuple):
    """Logits [..., V] for targets int64 [...], of which those with counts bool [...] make the loss."""

    logits: Tensor
    targets: Tensor
    counts: Tensor


def predict(model: PreTrainedModel, batch: Batch) -> Prediction:
    """The forward pass of a training step.

    A decoder predicts each token from those before it. An encoder-decoder reads the first half of the sequence and predicts
    the second (prefix language modelling, T5, arXiv 1910.10683, section 3.2.1).
    """
    tokens, counts = batch.tokens, batch.counts
    if not model.config.is_encoder_decoder:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return Prediction(logits, tokens[:, 1:], counts)
    half = _prefix(counts.shape[1])
    out = model(input_ids=tokens[:, :half], decoder_input_ids=tokens[:, half:-1], use_cache=False)
    return Prediction(out.logits, tokens[:, half + 1 :], counts[:, half:])


def counted(model: PreTrainedModel, batch: Batch) -> int:
    """Targets of a batch that make the loss."""
    first = _prefix(batch.counts.shape[1]) if model.config.is_encoder_decoder else 0
    return int(batch.counts[:, first:].sum())


def positions(model: PreTrainedModel, layers: list[MoELayer], length: int) -> int:
    """(token, MoE layer) pairs of one sequence of n = `length`."""
    if not model.config.is_encoder_decoder:
        return length * len(layers)
    half = _prefix(length)
    return sum(half if layer.name.startswith("encoder.") else length - half for layer in layers)


def _prefix(length: int) -> int:
    return length // 2

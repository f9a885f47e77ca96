"""How well held-out text is predicted, in bits per byte: comparable between tokenizers, and with compressors."""

import gzip
import lzma
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymoe.training.batches import TokenStream
from raymoe.training.text import Document


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """What a total cost in nats is, spread over the UTF-8 bytes of the text it predicts."""
    if num_bytes < 1:
        raise ValueError(f"bits per byte need a text, got {num_bytes} bytes")
    return nats / math.log(2) / num_bytes


@dataclass(frozen=True)
class EvalResult:
    """What predicting a held-out stream cost."""

    nats: float
    """Summed over the predicted tokens, separators included."""
    tokens: int
    """Predicted tokens that count: all but the stream's first for plain text, the answers' for conversations."""
    bytes: int
    """UTF-8 bytes these tokens stand for; a separator counts none, though its nats count."""

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, self.bytes)

    @property
    def loss(self) -> float:
        """Mean nats a token, as training reports it."""
        return self.nats / self.tokens


@torch.no_grad()
def evaluate(
    model: nn.Module, stream: TokenStream, sequence_length: int, batch_size: int, device: torch.device | str
) -> EvalResult:
    """Cost of a held-out stream under a causal LM.

    The stream is read in windows of ``sequence_length`` inputs, each starting where the one before ended, so every token but
    the first is predicted exactly once, the last ones in a shorter window; context does not reach across windows. Where the
    stream says which tokens are learnt, only these are summed. The first is an eos in a stream from ``pack``, so the bytes
    are those of the whole text, or of the part that is learnt. Losses are taken in float32 and summed in float64. The model
    is in eval mode meanwhile and is left as it was found.

    Args:
        model: maps ``input_ids`` int64 [b, n] to an output with ``logits`` [b, n, vocabulary], as in transformers.
        batch_size: windows in one forward; it changes memory and time, and no more than the last bits of the result.
        device: where the model's inputs go.
    """
    if sequence_length < 1 or batch_size < 1:
        raise ValueError(f"sequence_length and batch_size must be positive, got {sequence_length} and {batch_size}")
    if len(stream.tokens) < 2:
        raise ValueError(f"a stream of {len(stream.tokens)} token(s) has nothing to predict")
    counts = _counts(stream)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    done = 0
    with _eval_mode(model):
        for inputs, targets in _windows(stream, sequence_length, batch_size):
            logits = model(input_ids=inputs.to(device), use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.to(device).flatten(), reduction="none")
            predicted = counts[done : done + len(losses)]
            done += len(losses)
            nats += (losses.double() * torch.from_numpy(predicted).to(device)).sum()
    return EvalResult(nats.item(), int(counts.sum()), stream.num_bytes)


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the held-out text without a neural model."""

    unigram: float
    """Token frequencies of the training text, add-one smoothed: what a model reaches that has learnt no context."""
    gzip: float
    """gzip -9 of the held-out text alone."""
    xz: float
    """xz -9e of the held-out text alone."""


def baselines(
    train_frequencies_V: np.ndarray, held_out: TokenStream, held_out_documents: Iterable[Document]
) -> Baselines:
    """The figures to print beside a model's bits per byte on ``held_out``.

    Args:
        train_frequencies_V: int64 [V], how often each token of the vocabulary occurs in the training text.
        held_out_documents: the text that ``held_out`` is packed from; of conversations, the part that is learnt.
    """
    text = "".join(document.text for document in held_out_documents).encode()
    if len(text) != held_out.num_bytes:
        raise ValueError(f"held-out documents have {len(text)} bytes, the stream packed from them {held_out.num_bytes}")
    return Baselines(
        unigram=unigram_bits_per_byte(train_frequencies_V, held_out),
        gzip=gzip_bits_per_byte(text),
        xz=xz_bits_per_byte(text),
    )


def unigram_bits_per_byte(train_frequencies_V: np.ndarray, held_out: TokenStream) -> float:
    """Cost of the tokens that ``evaluate`` counts when each has probability (its count in train + 1) / (all + vocabulary).

    Args:
        train_frequencies_V: int64 [V].

    Raises:
        ValueError: a token is not below V.
    """
    vocab_size = len(train_frequencies_V)
    largest = int(held_out.tokens.max())
    if largest >= vocab_size:
        raise ValueError(f"token {largest} in the held-out stream, but the vocabulary has {vocab_size}")
    nats_V = np.log(train_frequencies_V.sum() + vocab_size) - np.log(train_frequencies_V + 1)
    return bits_per_byte(float(nats_V[held_out.tokens[1:][_counts(held_out)]].sum()), held_out.num_bytes)


def gzip_bits_per_byte(text: bytes) -> float:
    """What ``gzip -9`` makes of the text."""
    return _compressed_share(gzip.compress(text, compresslevel=9, mtime=0), text)


def xz_bits_per_byte(text: bytes) -> float:
    """What ``xz -9e`` makes of the text."""
    # a dictionary longer than the text finds nothing more, and takes 674 MiB at the preset's 64 MiB
    dictionary = min(64 << 20, max(4096, len(text)))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return _compressed_share(lzma.compress(text, filters=filters), text)


def _compressed_share(compressed: bytes, text: bytes) -> float:
    return bits_per_byte(len(compressed) * 8 * math.log(2), len(text))


def _counts(stream: TokenStream) -> np.ndarray:
    """bool [N - 1]: whether each token but the first counts."""
    return np.ones(len(stream.tokens) - 1, dtype=bool) if stream.counts is None else stream.counts[1:].copy()


def _windows(stream: TokenStream, sequence_length: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    # the copies also keep a read-only stream, as shared memory gives it, away from torch
    tokens = stream.tokens
    num_full = (len(tokens) - 1) // sequence_length
    for first in range(0, num_full, batch_size):
        start = first * sequence_length
        end = min(first + batch_size, num_full) * sequence_length
        yield _int64(tokens[start:end], sequence_length), _int64(tokens[start + 1 : end + 1], sequence_length)
    rest = tokens[num_full * sequence_length :]
    if len(rest) > 1:
        yield _int64(rest[:-1], len(rest) - 1), _int64(rest[1:], len(rest) - 1)


def _int64(tokens: np.ndarray, sequence_length: int) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64).reshape(-1, sequence_length))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # module by module: a part may be frozen in eval mode inside a model that trains
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training

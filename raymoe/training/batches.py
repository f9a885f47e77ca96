"""Text as one stream of tokens, and the global batch of every step as a pure function of the seed and the step.

B sequences in the global batch, n tokens predicted in each of them.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from raymoe.training.data.encode import Encoded, TextEncoder
from raymoe.training.data.examples import chunked
from raymoe.training.data.store import TokenStore
from raymoe.training.text import Document

TOKENS_FOLDER = "tokens"
"""Where `prepare_data` puts the tokens, inside the run's folder."""

_CHUNK_CHARS = 1 << 20


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Tokens of many documents in one line.

    ``pack`` puts an eos ahead of the first document and after every one. The one token that a causal model cannot predict, the
    first, then stands for no text, and all tokens but it stand for exactly ``num_bytes``.
    """

    tokens: np.ndarray
    """int32 [N], contiguous."""
    num_bytes: int
    """UTF-8 bytes of the documents, or of the part of them that is learnt; an eos counts none."""
    counts: np.ndarray | None = None
    """bool [N]: whether predicting the token is learnt; None: all are."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.tokens)

    @property
    def is_complete(self) -> bool:
        """Always: it is all here."""
        return True

    def wait(self, num_tokens: int | None) -> None:
        """Nothing to wait for."""

    def read(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Runs of tokens, int64 [R, length], and whether each is learnt, or None if all are. starts: int64 [R]."""
        index = starts[:, None] + np.arange(length)
        return self.tokens[index].astype(np.int64), None if self.counts is None else self.counts[index]

    @property
    def digest(self) -> str:
        """Hash of tokens and bytes: ranks that differ here read different text."""
        content = self.tokens.astype("<i4", copy=False).tobytes()
        return hashlib.blake2b(content, digest_size=16, salt=self.num_bytes.to_bytes(8, "little")).hexdigest()


def pack(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> TokenStream:
    """Tokenise documents and join them: eos, document, eos, document, eos.

    Documents are encoded as plain text, without truncation; what spells a special token in them is text. Holds the tokens
    in memory, and of the text one chunk at a time.

    Args:
        sequence_length: n; the stream must fill at least one sequence.

    Raises:
        ValueError: the tokenizer has no eos, or the text is shorter than one sequence.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be positive, got {sequence_length}")
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError("the tokenizer has no eos token, which separates documents. Set tokenizer.eos_token.")
    encoder = TextEncoder(tokenizer.backend_tokenizer.to_str(), eos)
    chunks = chunked(documents, _CHUNK_CHARS, lambda document: len(document.text))
    return pack_encoded([encoder(chunk) for chunk in chunks], eos, sequence_length)


def pack_encoded(encoded: Sequence[Encoded], eos: int, sequence_length: int) -> TokenStream:
    """Joins what an encoder made into one stream, with the eos ahead of it.

    Raises:
        ValueError: it is shorter than one sequence.
    """
    tokens = np.concatenate([np.array([eos], dtype=np.int32), *(piece.tokens for piece in encoded)])
    num_bytes = sum(piece.num_bytes for piece in encoded)
    if num_sequences(len(tokens), sequence_length) < 1:
        raise ValueError(
            f"too little text: {sum(piece.num_examples for piece in encoded)} document(s), {num_bytes} bytes, are "
            f"{len(tokens)} tokens, and one sequence of {sequence_length} needs {sequence_length + 1}. "
            "Give more text or lower sequence_length."
        )
    masks = [piece.counts for piece in encoded if piece.counts is not None]
    return TokenStream(tokens, num_bytes, np.concatenate([np.zeros(1, dtype=bool), *masks]) if masks else None)


def num_sequences(num_tokens: int, sequence_length: int) -> int:
    """Full sequences in a stream; neighbours share one token, so that each but the first token is predicted at most once."""
    return max(0, num_tokens - 1) // sequence_length


class Tokens(Protocol):
    """A stream of tokens, in memory or on disk, that may still be growing."""

    @property
    def num_tokens(self) -> int:
        """Tokens that can be read now."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether there will be no more."""
        ...

    def wait(self, num_tokens: int | None) -> None:
        """Until so many tokens are there (None: all), or no more will come."""
        ...

    def read(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Runs of tokens, int64 [R, length], and whether each is learnt, bool [R, length], or None if all are."""
        ...


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences to train on."""

    tokens: Tensor
    """int64 [B, n + 1]: inputs are ``[:, :-1]``, targets ``[:, 1:]``."""
    counts: Tensor
    """bool [B, n]: whether predicting target j counts in the loss; all True for plain text."""

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, start: int, stop: int) -> "Batch":
        """Some of the sequences; they share memory with these."""
        return Batch(self.tokens[start:stop], self.counts[start:stop])


class Batches:
    """The training data as an endless list of global batches.

    Every pass over the stream shuffles its sequences anew, all of them or within windows of neighbours; passes follow each
    other without a gap, so a batch may hold the end of one and the start of the next. ``batch(step)`` depends on (stream,
    sequence_length, global_batch, seed, window, step) alone: a run resumes at any step, with any number of workers, by asking
    for the next step. It does not depend on how much of a growing stream is there, as it waits for a window to be whole.

    Args:
        window: sequences that are shuffled together, neighbours in the stream; None: all, so the whole stream is waited for.

    Raises:
        ValueError: the stream has fewer sequences than one global batch.
    """

    def __init__(
        self, stream: Tokens, sequence_length: int, global_batch: int, seed: int, window: int | None = None
    ) -> None:
        if sequence_length < 1 or global_batch < 1:
            raise ValueError(
                f"sequence_length and global_batch must be positive, got {sequence_length} and {global_batch}"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        if window is not None and window < 1:
            raise ValueError(f"window must be positive, got {window}")
        self.sequence_length = sequence_length
        self.global_batch = global_batch
        self.seed = seed
        self._stream, self._window = stream, window
        stream.wait(None if window is None else max(window, global_batch) * sequence_length + 1)
        if self.num_sequences < global_batch:
            raise ValueError(
                f"too little text: {stream.num_tokens} tokens make {self.num_sequences} sequence(s) of {sequence_length}, "
                f"a global batch has {global_batch}. Give more text, or lower sequence_length or global_batch."
            )
        # a batch touches so many windows at most
        self._kept = 2 if window is None else global_batch // window + 2
        self._orders: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    @property
    def num_sequences(self) -> int:
        """Sequences in one pass, as far as the stream is there; the tokens past the last full one are left out."""
        return num_sequences(self._stream.num_tokens, self.sequence_length)

    def batch(self, step: int) -> Batch:
        """The global batch of a step, steps counting from 0; waits for tokens that are still being made.

        Raises:
            StoreError: they will never be, or are damaged.
            TimeoutError: nothing is being made.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        first = step * self.global_batch
        sequences = np.array([self._sequence(first + i) for i in range(self.global_batch)], dtype=np.int64)
        tokens, counts = self._stream.read(sequences * self.sequence_length, self.sequence_length + 1)
        learnt = np.ones((len(tokens), self.sequence_length), dtype=bool) if counts is None else counts[:, 1:].copy()
        return Batch(torch.from_numpy(tokens), torch.from_numpy(learnt))

    def _sequence(self, position: int) -> int:
        """Which sequence of the stream is the one at a position of the endless list."""
        if not self._stream.is_complete:
            assert self._window is not None, "the whole stream was waited for"
            end = (position // self._window + 1) * self._window
            if self.num_sequences < end:
                self._stream.wait(end * self.sequence_length + 1)
            if self.num_sequences >= end:
                # a whole window, of the first pass as there is more than the position
                start = end - self._window
                return start + int(self._order(0, start // self._window, self._window)[position - start])
        total = self.num_sequences
        epoch, rest = divmod(position, total)
        number, place = divmod(rest, self._window or total)
        start = number * (self._window or total)
        return start + int(self._order(epoch, number, min(self._window or total, total - start))[place])

    def _order(self, epoch: int, number: int, size: int) -> np.ndarray:
        key = (epoch, number, size)
        order = self._orders.get(key)
        if order is None:
            # NumPy keeps raw bits the same over its versions, which it does not promise for permutation()
            generator = np.random.Philox(
                key=np.array([self.seed, epoch], dtype=np.uint64), counter=np.array([0, 0, 0, number], dtype=np.uint64)
            )
            order = np.argsort(generator.random_raw(size), kind="stable")
            while len(self._orders) >= self._kept:
                self._orders.popitem(last=False)
            self._orders[key] = order
        return order


def open_batches(
    folder: Path, *, sequence_length: int, global_batch: int, seed: int, timeout_s: float = 300
) -> Batches:
    """The batches of the data that `prepare_data` put into a folder; every rank opens them for itself.

    Waits for what is still being tokenised: everything, or the first window with ``data.shuffle: N``.

    Args:
        timeout_s: how long to wait, here and later, while no token is added.

    Raises:
        StoreError: no tokens there, damaged ones, or the tokenising failed.
        TimeoutError: the tokenising makes no progress.
        ValueError: fewer sequences than one global batch.
    """
    store = TokenStore(folder / TOKENS_FOLDER, timeout_s=timeout_s)
    return Batches(store, sequence_length, global_batch, seed, store.index.shuffle)


def rank_slice(batch: Batch, rank: int, world: int) -> Batch:
    """One rank's sequences of a global batch: contiguous, sizes differing by one at most; none if there are too few.

    As ranks may differ in size, average gradients and losses over what counts on all ranks, not over the ranks.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, {world}), got {rank}")
    return batch.rows(len(batch) * rank // world, len(batch) * (rank + 1) // world)

"""Text as one stream of tokens, and the global batch of every step as a pure function of the seed and the step.

B sequences in the global batch, n tokens predicted in each of them.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from raymoe.training.text import Document
from raymoe.training.tokenizer import plain_encoder

_CHUNK_CHARS = 1 << 20

Rows = TypeVar("Rows", Tensor, np.ndarray)


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Tokens of many documents in one line.

    ``pack`` puts an eos ahead of the first document and after every one. The one token that a causal model cannot predict, the
    first, then stands for no text, and all tokens but it stand for exactly ``num_bytes``.
    """

    tokens: np.ndarray
    """int32 [N], contiguous."""
    num_bytes: int
    """UTF-8 bytes of the documents; an eos counts none."""

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
    if eos is None:
        raise ValueError("the tokenizer has no eos token, which separates documents. Set tokenizer.eos_token.")
    encoder = plain_encoder(tokenizer)
    pieces = [np.array([eos], dtype=np.int32)]
    num_bytes = 0
    for texts in _chunks(documents):
        num_bytes += sum(len(text.encode()) for text in texts)
        for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, eos], dtype=np.int32))
    tokens = np.concatenate(pieces)
    if num_sequences(len(tokens), sequence_length) < 1:
        raise ValueError(
            f"too little text: {len(pieces) - 1} document(s), {num_bytes} bytes, are {len(tokens)} tokens, and one sequence "
            f"of {sequence_length} needs {sequence_length + 1}. Give more text or lower sequence_length."
        )
    return TokenStream(tokens, num_bytes)


def num_sequences(num_tokens: int, sequence_length: int) -> int:
    """Full sequences in a stream; neighbours share one token, so that each but the first token is predicted at most once."""
    return max(0, num_tokens - 1) // sequence_length


class Batches:
    """The training data as an endless list of global batches.

    Every pass over the stream shuffles all its sequences anew; passes follow each other without a gap, so a batch may hold the
    end of one and the start of the next. ``batch(step)`` depends on (stream, sequence_length, global_batch, seed, step)
    alone: a run resumes at any step, with any number of workers, by asking for the next step.

    Raises:
        ValueError: the stream has fewer sequences than one global batch.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, global_batch: int, seed: int) -> None:
        if sequence_length < 1 or global_batch < 1:
            raise ValueError(
                f"sequence_length and global_batch must be positive, got {sequence_length} and {global_batch}"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        self.num_sequences = num_sequences(len(stream.tokens), sequence_length)
        """Sequences in one pass; the tokens past the last full one are left out."""
        if self.num_sequences < global_batch:
            raise ValueError(
                f"too little text: {len(stream.tokens)} tokens make {self.num_sequences} sequence(s) of {sequence_length}, "
                f"a global batch has {global_batch}. Give more text, or lower sequence_length or global_batch."
            )
        self.sequence_length = sequence_length
        self.global_batch = global_batch
        self.seed = seed
        self._tokens = stream.tokens
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> Tensor:
        """The global batch of a step, steps counting from 0.

        Returns:
            int64 [B, n + 1]: inputs are ``[:, :-1]``, targets ``[:, 1:]``.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        first = step * self.global_batch
        positions = range(first, first + self.global_batch)
        sequences = np.array([self._order(p // self.num_sequences)[p % self.num_sequences] for p in positions])
        window = np.arange(self.sequence_length + 1)
        return torch.from_numpy(self._tokens[sequences[:, None] * self.sequence_length + window].astype(np.int64))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # NumPy keeps raw bits the same over its versions, which it does not promise for permutation()
            bits = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.num_sequences)
            if len(self._orders) == 2:  # a batch spans two passes at most
                del self._orders[min(self._orders)]
            self._orders[epoch] = np.argsort(bits, kind="stable")
        return self._orders[epoch]


def rank_slice(batch: Rows, rank: int, world: int) -> Rows:
    """One rank's sequences of a global batch: contiguous, sizes differing by one at most; none if there are too few.

    As ranks may differ in size, average gradients and losses over the tokens of all ranks, not over the ranks.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, {world}), got {rank}")
    return batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]


def _chunks(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= _CHUNK_CHARS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts

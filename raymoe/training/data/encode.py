"""From examples to tokens, and which of them are learnt. What tokenises plain text needs neither torch nor transformers,
so that a process for it starts in a fraction of a second."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tokenizers import Tokenizer

from raymoe.training.data.examples import Conversation, Pair
from raymoe.training.text import Document

if TYPE_CHECKING:
    from raymoe.training.data.chat import ChatRenderer


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of some examples, each with the eos that ends it."""

    tokens: np.ndarray
    """int32 [N]."""
    counts: np.ndarray | None
    """bool [N]: whether predicting the token is learnt; None: all are."""
    num_bytes: int
    """UTF-8 bytes of the text that is learnt."""
    num_examples: int


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Everything an encoder is made from, small enough to send to a process."""

    format: Literal["text", "chat", "pairs"]
    folder: Path
    """A directory with the saved tokenizer."""
    backend: str
    """The tokenizer as `tokenizers` writes it."""
    eos: int

    def build(self) -> "TextEncoder | PairEncoder | ChatEncoder":
        """The encoder for the format."""
        if self.format == "text":
            return TextEncoder(self.backend, self.eos)
        if self.format == "pairs":
            return PairEncoder(self.backend, self.eos)
        # transformers takes a second to import, which plain text does not need
        from raymoe.training.data.chat import ChatRenderer
        from raymoe.training.tokenizer import load_tokenizer

        return ChatEncoder(ChatRenderer(load_tokenizer(self.folder)), self.eos)


class TextEncoder:
    """Documents as plain text: what spells a special token in them is text."""

    def __init__(self, backend: str, eos: int) -> None:
        self._tokenizer, self._eos = plain_tokenizer(backend), eos

    def __call__(self, documents: Sequence[Document]) -> Encoded:
        """Every token is learnt, the eos that ends a document too."""
        texts = [document.text for document in documents]
        pieces = [
            np.array([*encoding.ids, self._eos], dtype=np.int32)
            for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
        return Encoded(_join(pieces), None, sum(len(text.encode()) for text in texts), len(texts))


class PairEncoder:
    """Prompts with their completions as plain text; completions and the eos after them are learnt.

    A pair is tokenised as one text. A token over the seam belongs to the prompt: it is given, not learnt.
    """

    def __init__(self, backend: str, eos: int) -> None:
        self._tokenizer, self._eos = plain_tokenizer(backend), eos

    def __call__(self, pairs: Sequence[Pair]) -> Encoded:
        """Encodes them one after another."""
        pieces, masks = [], []
        encodings = self._tokenizer.encode_batch([pair.text for pair in pairs], add_special_tokens=False)
        for pair, encoding in zip(pairs, encodings, strict=True):
            pieces.append(np.array([*encoding.ids, self._eos], dtype=np.int32))
            starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
            masks.append(np.append(starts >= len(pair.prompt), True))
        num_bytes = sum(len(pair.completion.encode()) for pair in pairs)
        return Encoded(_join(pieces), np.concatenate([np.zeros(0, bool), *masks]), num_bytes, len(pairs))


class ChatEncoder:
    """Conversations as the chat template renders them; what the assistant says, and what ends its turn, is learnt.

    An eos is added unless the conversation ends with one; that one only separates, so it is not learnt.
    """

    def __init__(self, renderer: "ChatRenderer", eos: int) -> None:
        self._renderer, self._eos = renderer, eos

    def __call__(self, conversations: Sequence[Conversation]) -> Encoded:
        """Encodes them one after another.

        Raises:
            ValueError: the template refuses a conversation, or none of its tokens would be learnt; names file and row.
        """
        pieces, masks = [], []
        for conversation in conversations:
            ids, counts = self._renderer(conversation)
            if not ids or ids[-1] != self._eos:
                ids, counts = [*ids, self._eos], [*counts, False]
            pieces.append(np.array(ids, dtype=np.int32))
            masks.append(np.array(counts, dtype=bool))
        num_bytes = sum(len(conversation.counted_text.encode()) for conversation in conversations)
        return Encoded(_join(pieces), np.concatenate([np.zeros(0, bool), *masks]), num_bytes, len(pieces))


Encoder = TextEncoder | PairEncoder | ChatEncoder


def plain_tokenizer(backend: str) -> Tokenizer:
    """A tokenizer that encodes text as it stands: no truncation or padding, and what spells a special token is text like
    any other, so a document about chat templates does not end in its middle."""
    tokenizer = Tokenizer.from_str(backend)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _join(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int32), *pieces])

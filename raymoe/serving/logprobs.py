"""The log-probabilities of an answer's tokens, told together with the text they belong to."""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple, cast

from raymoe.inference.requests import TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenText(NamedTuple):
    """One token as a client sees it."""

    text: str
    """Where its bytes are no whole characters: its name in the vocabulary."""
    bytes: list[int] | None
    """None if the vocabulary does not say."""


class Likelihood(NamedTuple):
    token: TokenText
    logprob: float
    top: list[tuple[TokenText, float]]
    offset: int
    """Characters of the answer before this token."""


class Likelihoods:
    """Holds back what belongs to text that is held back, and to the stop string that may come of it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._held: list[Likelihood] = []

    def add(self, told: TokenLogprobs, offset: int) -> None:
        top = [(self.text_of(token), logprob) for token, logprob in told.top]
        self._held.append(Likelihood(self.text_of(told.token), told.logprob, top, offset))

    def release(self, num_sent: int | None) -> list[Likelihood]:
        """Those that begin within the first `num_sent` characters, which are out; None: all."""
        ready = [one for one in self._held if num_sent is None or one.offset < num_sent]
        self._held = self._held[len(ready) :]
        return ready

    def text_of(self, token: int) -> TokenText:
        """What a token says."""
        piece = cast(str, self._tokenizer.convert_ids_to_tokens(token))
        text = cast(str, self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if "\N{REPLACEMENT CHARACTER}" in text:
            return TokenText(piece, _bytes_of(piece))
        if piece.startswith("\u2581") and not text.startswith(" "):
            # alone it decodes as if it began the text
            text = f" {text}"
        return TokenText(text, list(text.encode()))


def _bytes_of(piece: str) -> list[int] | None:
    if piece.startswith("<0x") and piece.endswith(">"):
        return [int(piece[3:-1], 16)]
    byte_of = _byte_level_alphabet()
    return [byte_of[char] for char in piece] if all(char in byte_of for char in piece) else None


@cache
def _byte_level_alphabet() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}

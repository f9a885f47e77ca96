"""From a growing list of tokens to text that can be sent: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 8
"""Tokens of the prompt that a `TextStream` needs to know how the first new one decodes."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character (yet)."""


def decoder(tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[int]], str]:
    """Tokens to the text that a client sees: without special tokens, and otherwise as they are."""

    def decode(tokens: list[int]) -> str:
        return cast(str, tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode


class TextStream:
    """Decodes token by token; what `push` and `finish` return adds up to the decoded whole."""

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()):
        """`context`: the tokens before the first one, of which some decoders make its leading blank depend."""
        self._decode = decode
        # tokens that are out already but may change how the next ones decode, then those that are not out in full, of whose
        # text so many characters are
        self._context: list[int] = list(context)
        self._held: list[int] = []
        self._sent = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The characters that these tokens complete; what may still become one waits for the tokens to come."""
        self._held += tokens
        text = self._text()
        whole = text.rstrip(_INCOMPLETE)
        new = whole[self._sent :]
        if text and whole == text:
            self._context, self._held, self._sent = self._held, [], 0
        else:
            self._sent = max(self._sent, len(whole))
        return new

    def finish(self) -> str:
        """What is left; bytes that never became a character come out as U+FFFD."""
        text = self._text()[self._sent :]
        self._context, self._held, self._sent = [], [], 0
        return text

    def _text(self) -> str:
        if not self._held:
            return ""
        before = self._decode(self._context)
        return self._decode(self._context + self._held)[len(before) :]


class StopStrings:
    """Cuts a stream of text before the first stop string, and holds back what may be the beginning of one.

    The first is the one that is complete first (of several that end together the longest), so how the text is cut into pieces
    makes no difference.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to send, whether a stop string was found: nothing is sent after that)."""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            return self._held[:at], True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        at = len(self._held) - keep
        ready, self._held = self._held[:at], self._held[at:]
        return ready, False

    def finish(self) -> str:
        """The beginning of a stop string that did not come."""
        ready, self._held = self._held, ""
        return ready

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class StopWatch:
    """Finds the token that completes a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str], context: Sequence[int] = ()):
        """`context`: see `TextStream`."""
        self._stream = TextStream(decode, context[-CONTEXT_TOKENS:])
        self._strings = StopStrings(stops)

    @property
    def found(self) -> str | None:
        return self._strings.found

    def take(self, tokens: Sequence[int]) -> int | None:
        """How many of these next tokens there are up to the one that completes a stop string; None if none does."""
        for num_taken, token in enumerate(tokens, start=1):
            if self._strings.push(self._stream.push([token]))[1]:
                return num_taken
        return None

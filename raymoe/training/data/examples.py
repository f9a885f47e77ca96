"""What training reads, one row of a source at a time: documents, conversations, or prompts with their completions."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raymoe.training.data.files import Row, check_encodable


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of which only the assistant's are learnt."""

    name: str
    messages: list[dict[str, Any]]

    @property
    def num_bytes(self) -> int:
        """Length of all contents in UTF-8."""
        return len(self.text.encode())

    @property
    def text(self) -> str:
        """All contents, a line each: what a tokenizer may be trained on."""
        return "".join(f"{content_text(message)}\n" for message in self.messages)

    @property
    def counted_text(self) -> str:
        """What is learnt: the assistant's contents."""
        return "".join(content_text(message) for message in self.messages if message["role"] == "assistant")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the completion that alone is learnt."""

    name: str
    prompt: str
    completion: str

    @property
    def num_bytes(self) -> int:
        """Length of both in UTF-8."""
        return len(self.text.encode())

    @property
    def text(self) -> str:
        """Both, as a tokenizer may be trained on them."""
        return self.prompt + self.completion

    @property
    def counted_text(self) -> str:
        """What is learnt."""
        return self.completion


def conversation(row: Row, field: str) -> Conversation:
    """Checks a row's list of {role, content}.

    Raises:
        ValueError: not such a list, a content that is neither text nor a list of text parts, or no turn of the assistant's;
            names the file, the line or row, and the message.
    """
    place = row.place(field)
    value = row.values[field]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: expected a list of messages {{role, content}}, got {_kind(value)}")
    messages = [_message(message, f"{place}, message {number}") for number, message in enumerate(value, start=1)]
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{place}: no message of role 'assistant', so there is nothing to learn")
    return Conversation(row.name, messages)


def pair(row: Row, prompt_field: str, completion_field: str) -> Pair:
    """Raises: ValueError for fields that are no strings, or an empty completion; names the file and the line or row."""
    completion = row.string(completion_field)
    if not completion:
        raise ValueError(f"{row.place(completion_field)}: empty, so there is nothing to learn")
    return Pair(row.name, row.string(prompt_field), completion)


def content_text(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content is a string, a list of parts {type: text, text}, or nothing (a tool call)."""
    content = message.get("content")
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def chunked(examples: Iterable[Any], most_bytes: int, size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Lists of neighbours of about `most_bytes`; one example alone may be longer."""
    chunk: list[Any] = []
    num_bytes = 0
    for example in examples:
        chunk.append(example)
        num_bytes += size(example)
        if num_bytes >= most_bytes:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{place}: expected an object with 'role' and 'content', got {_kind(message)}")
    # Parquet gives every message all keys of the column, null where the row has none
    message = {key: value for key, value in message.items() if value is not None}
    content = message.setdefault("content", "")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ValueError(f"{place}: content must be a string or a list of text parts, got {_kind(content)}")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{place}: only text content can be trained on, got {part!r:.80}")
        check_encodable(part["text"], place)
    return message


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__

"""Conversations as a tokenizer's chat template renders them, and which of their tokens the assistant says."""

import re
from typing import Any

from transformers import PreTrainedTokenizerFast

from raymoe.training.data.examples import Conversation

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Tokens of a conversation, and whether each belongs to an assistant's turn.

    A template with ``{% generation %}`` says itself what the assistant says. For others the conversation is rendered up to
    every assistant's turn, once with the prompt that asks for an answer and once with the answer: what the second has more
    is the turn, with whatever the template ends it. A token over the seam belongs to the prompt.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "data.format: chat needs a chat template, and the tokenizer has none. Save one with the tokenizer, or set "
                "tokenizer.chat_template: plain."
            )
        self._tokenizer = tokenizer
        self._has_generation = _GENERATION.search(tokenizer.get_chat_template()) is not None

    def __call__(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it is learnt.

        Raises:
            ValueError: the template refuses the conversation, renders it otherwise when more follows, or leaves nothing to
                learn; names the file and row.
        """
        try:
            ids, counts = self._marked(conversation) if self._has_generation else self._by_prefixes(conversation)
        except Exception as error:  # templates raise jinja2's errors, and whatever their own code runs into
            raise ValueError(f"{conversation.name}: the chat template refuses it: {error}") from error
        if not any(counts):
            raise ValueError(f"{conversation.name}: the chat template leaves nothing of the assistant's turns")
        return ids, counts

    def _marked(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        encoding: Any = self._tokenizer.apply_chat_template(
            conversation.messages, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoding["input_ids"]), [bool(mask) for mask in encoding["assistant_masks"]]

    def _by_prefixes(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        messages = conversation.messages
        text = self._render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            after = self._render(messages[: index + 1])
            # some templates write the end of text only after the last message
            if not after.startswith(before):
                before = _common_prefix(before, after)
            spans.append((len(before), len(_common_prefix(after, text))))
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets: Any = encoding["offset_mapping"]
        counts = [any(first <= start < last for first, last in spans) and start < end for start, end in offsets]
        return list(encoding["input_ids"]), counts

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text


def _common_prefix(left: str, right: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[:length]

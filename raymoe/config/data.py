"""Where training text comes from and how it becomes tokens."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from raymoe.config.base import Strict


class DataConfig(Strict):
    source: str = "stdlib"
    """`stdlib` (source and documentation of the Python standard library on this machine), or a text, JSONL or Parquet file,
    or a directory of them: a path, or a URI that pyarrow or fsspec knows (`s3://`, `gs://`, `memory://`). Text and JSONL
    may be compressed."""
    format: Literal["text", "chat", "pairs"] = "text"
    """`text`: every token is learnt. `chat`: conversations, rendered by the tokenizer's chat template; only the
    assistant's turns are learnt. `pairs`: prompts and completions; only completions are learnt."""
    text_field: str = "text"
    """Field (JSONL) or column (Parquet) that holds the text."""
    messages_field: str = "messages"
    """With `format: chat`: field or column that holds a list of {role, content}."""
    prompt_field: str = "prompt"
    """With `format: pairs`: field or column that holds the prompt."""
    completion_field: str = "completion"
    """With `format: pairs`: field or column that holds the completion."""
    held_out: float = Field(default=0.03, gt=0, lt=0.5)
    """Share of the text, by whole documents, kept for evaluation."""
    held_out_bytes: int = Field(default=2_000_000, ge=1)
    """Most bytes of text to keep for evaluation, whatever the share."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens a training sequence."""
    shuffle: Literal["all"] | int = "all"
    """`all`: all sequences of a pass in random order; training starts when all text is tokenised. A number: random order
    within windows of so many sequences; training starts when the first window is tokenised."""
    tokenizer_processes: int | None = Field(default=None, ge=0)
    """Processes that tokenise; 0: the driver itself. Default: one a core, or the driver itself if the text is small."""

    @field_validator("shuffle")
    @classmethod
    def _at_least_two(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 2:
            raise ValueError("must be 'all' or an integer of at least 2")
        return value


class TokenizerConfig(Strict):
    path: Path | None = None
    """A directory with a saved tokenizer; without it a byte-level BPE is trained on the training text. With `model.path`
    the default is the model's own tokenizer."""
    vocab_size: int = Field(default=4096, ge=260)
    """Size of the vocabulary that is trained."""
    chat_template: Literal["plain"] | None = None
    """Template for a tokenizer that has none. `plain`: lines `User:` and `Assistant:` ahead of the turns, answers ended by eos."""

"""Where training text comes from and how it becomes tokens."""

from pathlib import Path

from pydantic import Field

from raymoe.config.base import Strict


class DataConfig(Strict):
    source: str = "stdlib"
    """`stdlib` (source and documentation of the Python standard library on this machine), or a text, JSONL or Parquet file,
    or a directory of them."""
    text_field: str = "text"
    """Field (JSONL) or column (Parquet) that holds the text."""
    held_out: float = Field(default=0.03, gt=0, lt=0.5)
    """Share of the text, by whole documents, kept for evaluation."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens a training sequence."""


class TokenizerConfig(Strict):
    path: Path | None = None
    """A directory with a saved tokenizer; without it a byte-level BPE is trained on the training text. With `model.path`
    the default is the model's own tokenizer."""
    vocab_size: int = Field(default=4096, ge=260)
    """Size of the vocabulary that is trained."""

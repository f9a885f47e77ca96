"""A configured source: its examples in a fixed order, a sample from all over it, and what tells it from another source."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from raymoe.config import DataConfig
from raymoe.training.data.examples import Conversation, Pair, conversation, pair
from raymoe.training.data.files import Row, SourceFiles, find_files, read_rows
from raymoe.training.text import Document, require_text, stdlib_documents

AnyExample = Document | Conversation | Pair

_PROBED_FILES = 64


@dataclass(frozen=True, slots=True)
class Probe:
    """The examples a run looks at before it streams: to hold some of them out, and to train a tokenizer on the others."""

    examples: list[AnyExample]
    is_everything: bool
    """Whether the source has no more."""


class Source:
    """Examples of `data.source`, or of an iterable of rows that stands in for it.

    Raises:
        ValueError: a source that is missing or cannot be read; while streaming, a bad row by file and line.
    """

    def __init__(self, config: DataConfig, rows: Iterable[Row] | None = None) -> None:
        self._config = config
        self._options = row_options(config)
        self._rows: Iterator[Row] | None = None if rows is None else iter(rows)
        self._head: list[AnyExample] = []
        self._files: SourceFiles | None = None
        if rows is None and config.source == "stdlib":
            if config.format != "text":
                raise ValueError(
                    f"data.source: stdlib is text; data.format {config.format} needs JSONL or Parquet files"
                )
        elif rows is None:
            self._files = find_files(config.source, rows_only=config.format != "text")

    def identity(self) -> Any:
        """Equal for two sources only if they hold the same, as far as names, sizes and times tell; None if nothing does."""
        if self._rows is not None:
            return None
        if self._files is None:
            return ["stdlib", sys.version]
        return [list(item) for item in self._files.identity()]

    def examples(self) -> Iterator[AnyExample]:
        """All of them, in the same order on every machine. Rows that were given can be read once only."""
        return require_text(self._all(), self._config.source)

    def probe(self, most_bytes: int) -> Probe:
        """Examples of `most_bytes` together: all there are, or the beginnings of up to 64 files spread over the source."""
        if self._files is None or len(self._files.files) == 1:
            return self._head_probe(most_bytes)
        found, is_everything = _take(self.examples(), most_bytes)
        if is_everything:
            return Probe(found, True)
        files = self._files.files
        chosen = files if len(files) <= _PROBED_FILES else files[:: -(-len(files) // _PROBED_FILES)]
        found = []
        for file in chosen:
            found += _take(self._read(itertools.repeat(file, 1)), max(1, most_bytes // len(chosen)))[0]
        return Probe([example for example in found if example.num_bytes], False)

    def _head_probe(self, most_bytes: int) -> Probe:
        found, is_everything = _take(self.examples(), most_bytes)
        if self._rows is not None:
            self._head = found
        return Probe(found, is_everything)

    def _all(self) -> Iterator[AnyExample]:
        if self._rows is not None:
            return itertools.chain(self._head, map(self._example, self._rows))
        return stdlib_documents() if self._files is None else self._read(self._files.files)

    def _read(self, files: Iterable[Any]) -> Iterator[AnyExample]:
        assert self._files is not None
        for file in files:
            yield from map(self._example, read_rows(self._files, file, self._options))

    def _example(self, row: Row) -> AnyExample:
        config = self._config
        if config.format == "chat":
            return conversation(row, config.messages_field)
        if config.format == "pairs":
            return pair(row, config.prompt_field, config.completion_field)
        return Document(row.name, row.string(config.text_field))


def row_options(config: DataConfig) -> dict[str, str]:
    """The fields that `data.format` needs, as {option: field}."""
    options = {"text": ["text_field"], "chat": ["messages_field"], "pairs": ["prompt_field", "completion_field"]}
    return {option: getattr(config, option) for option in options[config.format]}


def _take(examples: Iterator[AnyExample], most_bytes: int) -> tuple[list[AnyExample], bool]:
    taken: list[AnyExample] = []
    num_bytes = 0
    for example in examples:
        taken.append(example)
        num_bytes += example.num_bytes
        # of a single one nothing could be held out as a whole
        if num_bytes >= most_bytes and len(taken) > 1:
            return taken, False
    return taken, True

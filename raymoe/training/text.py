"""Real text as named documents: the standard library, text files, JSONL, Parquet, and directories of them."""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from raymoe.training.data.files import decode_file, find_files, read_rows

# Codec tables repeat each other almost word for word, and the topics module holds escaped what is read unescaped below:
# either would put held-out text into the training side. Tests exist only on some installations.
_STDLIB_SKIPPED = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "encodings",
        "pydoc_data",
    }
)
_PART_BYTES = 64 * 1024


class Example(Protocol):
    """What is trained on or held out as a whole."""

    @property
    def name(self) -> str:
        """Unique in its source and the same on every machine."""
        ...

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8."""
        ...


ExampleT = TypeVar("ExampleT", bound=Example)


@dataclass(frozen=True, slots=True)
class Document:
    """One text that is trained on or held out as a whole; ``name`` is unique in its source and the same on every machine."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


def read_documents(source: str | Path | None = None, *, text_field: str = "text") -> Iterator[Document]:
    """Stream the documents of a source, in the same order on every machine.

    Args:
        source: None or ``"stdlib"``: the running Python's standard library (sources without tests, and the language
            reference of ``pydoc``), no download; it differs between Python versions. Otherwise a path or a URI that
            pyarrow or fsspec knows (``file://``, ``s3://``, ``memory://``): a text file (one document; a large one is
            several, ``path#k``), a ``.jsonl`` or ``.parquet`` file (one document a row), or a directory, read recursively in
            the order of relative paths. Text and JSONL may be compressed (``.gz``, ``.zst``, ``.bz2``, ``.lz4``).
        text_field: the key of a JSONL object, or the Parquet column, that holds the text.

    Yields:
        Documents named by their path inside the source; a row is ``path:n``, lines and rows count from 1. Empty
        texts are left out, as there is nothing in them to learn. In a directory, hidden files and suffixes that are not
        text, JSONL or Parquet are passed over.

    Raises:
        ValueError: at once for a path that is missing or of an unknown suffix, while reading for an empty source,
            a row without ``text_field``, a value that is no string, or bytes that are not UTF-8; the message names the
            file and the line, row or byte.
    """
    if source is None or source == "stdlib":
        return require_text(stdlib_documents(), "stdlib")
    files = find_files(source)

    def documents() -> Iterator[Document]:
        for file in files.files:
            for row in read_rows(files, file, {"text_field": text_field}):
                yield Document(row.name, row.string(text_field))

    return require_text(documents(), str(source))


def split_documents(
    documents: Iterable[ExampleT], held_out: float, seed: int = 0, *, most_bytes: int | None = None
) -> tuple[list[ExampleT], list[ExampleT]]:
    """Split a source into what is trained on and what is only measured, by whole documents (or conversations).

    Documents are looked at in the order of a hash of (seed, name), and held out where that brings the held-out bytes closer
    to their share: the split is the same on every machine and does not depend on the order of reading. A single document
    is cut by ``cut_document`` and its tail held out.

    Args:
        held_out: share of the UTF-8 bytes to hold out, in (0, 1); met as closely as whole documents allow.
        most_bytes: aim at no more than this, whatever the share.

    Returns:
        (train, held_out), both non-empty and each in the order of reading.

    Raises:
        ValueError: the share is out of range, or the documents cannot give two non-empty sides.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share in (0, 1), got {held_out}")
    whole: list[Any] = list(documents)
    total = sum(document.num_bytes for document in whole)
    target = total * held_out if most_bytes is None else min(total * held_out, most_bytes)
    if len(whole) == 1 and isinstance(whole[0], Document):
        # parts of half the target, so that the tail can come close to it
        whole = cut_document(whole[0], min(_PART_BYTES, max(1, int(target / 2))))
        chosen = _closest_tail([part.num_bytes for part in whole], target)
    else:
        ranked = sorted(range(len(whole)), key=lambda i: (_name_hash(whole[i].name, seed), i))
        chosen = _closest(ranked, [document.num_bytes for document in whole], target)
    if not 0 < len(chosen) < len(whole):
        raise ValueError(
            f"cannot hold out {held_out} of {len(whole)} document(s), {total} bytes, and keep some to train on. "
            "Add documents, break a single text into lines, or lower held_out."
        )
    return (
        [document for i, document in enumerate(whole) if i not in chosen],
        [document for i, document in enumerate(whole) if i in chosen],
    )


def cut_document(document: Document, part_bytes: int = _PART_BYTES) -> list[Document]:
    """Cut a document into contiguous parts ``name#k`` of at least ``part_bytes``, the last one apart, that join to its text.

    Cuts are at blank lines; a paragraph that makes a part twice as long is cut at a line end. Lines stay whole.
    """
    parts: list[str] = []
    lines: list[str] = []
    size = 0
    for line in document.text.splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= part_bytes and (not line.strip() or size >= 2 * part_bytes):
            parts.append("".join(lines))
            lines, size = [], 0
    if lines:
        parts.append("".join(lines))
    return [Document(f"{document.name}#{k}", text) for k, text in enumerate(parts)]


def _closest(ranked: list[int], sizes: list[int], target: float) -> set[int]:
    chosen: set[int] = set()
    held = 0
    for i in ranked:
        if abs(held + sizes[i] - target) < abs(held - target):
            chosen.add(i)
            held += sizes[i]
    if not chosen and ranked:  # every document is more than twice the target
        chosen.add(min(ranked, key=lambda i: sizes[i]))
    return chosen


def _closest_tail(sizes: list[int], target: float) -> set[int]:
    first = len(sizes) - 1
    held = sizes[-1] if sizes else 0
    while first > 0 and abs(held + sizes[first - 1] - target) < abs(held - target):
        first -= 1
        held += sizes[first]
    return set(range(first, len(sizes)))


def _name_hash(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()


def require_text(documents: Iterable[ExampleT], source: str) -> Iterator[ExampleT]:
    """Leaves out what is empty. Raises: ValueError, at the end, if nothing else came."""
    is_empty = True
    for document in documents:
        if document.num_bytes:
            is_empty = False
            yield document
    if is_empty:
        raise ValueError(f"text source {source!r} holds no text")


def stdlib_documents() -> Iterator[Document]:
    """The running Python's standard library without tests, and the language reference of ``pydoc``."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in names:
        # _sysconfigdata is how this Python was built, not source
        if _STDLIB_SKIPPED.isdisjoint(name.split("/")[:-1]) and not name.startswith("_sysconfigdata"):
            yield Document(name, decode_file(root / name))

    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Document(f"pydoc_data/topics/{topic}", topics[topic])

"""Real text as named documents: the standard library, text files, JSONL, Parquet, and directories of them."""

import hashlib
import io
import json
import posixpath
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cu", ".go", ".java", ".js", ".rs", ".sh", ".sql", ".ts"}
)
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIXES = frozenset({".parquet"})

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
_PARQUET_ROWS = 1024
_READ_BYTES = 1 << 20


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
            ``pyarrow.fs`` knows (``file://``, ``s3://``, ``gs://``): a text file (one document), a ``.jsonl`` or
            ``.parquet`` file (one document a row), or a directory, read recursively in the order of relative paths.
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
        return _require_text(_stdlib_documents(), "stdlib")
    if not str(source):
        raise ValueError("text source is an empty string. Give a file, a directory, a URI or 'stdlib'.")
    filesystem, root = _locate(str(source))
    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise ValueError(f"text source {str(source)!r} does not exist. Give a file, a directory, a URI or 'stdlib'.")
    if info.type == fs.FileType.Directory:
        files = _files_under(filesystem, root, str(source))
    else:
        if _reader(root) is None:
            raise ValueError(f"text source {str(source)!r} has an unknown suffix; known are {_known_suffixes()}")
        files = [(posixpath.basename(root), root)]

    def documents() -> Iterator[Document]:
        for name, path in files:
            reader = _reader(path)
            assert reader is not None
            yield from reader(filesystem, path, name, text_field)

    return _require_text(documents(), str(source))


def split_documents(
    documents: Iterable[Document], held_out: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Split a source into what is trained on and what is only measured, by whole documents.

    Documents are looked at in the order of a hash of (seed, name), and held out where that brings the held-out bytes closer
    to their share: the split is the same on every machine and does not depend on the order of reading. A single document
    is cut by ``cut_document`` and its tail held out.

    Args:
        held_out: share of the UTF-8 bytes to hold out, in (0, 1); met as closely as whole documents allow.

    Returns:
        (train, held_out), both non-empty and each in the order of reading.

    Raises:
        ValueError: the share is out of range, or the documents cannot give two non-empty sides.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share in (0, 1), got {held_out}")
    documents = list(documents)
    total = sum(document.num_bytes for document in documents)
    target = total * held_out
    if len(documents) == 1:
        # parts of half the target, so that the tail can come close to it
        documents = cut_document(documents[0], min(_PART_BYTES, max(1, int(target / 2))))
        chosen = _closest_tail([part.num_bytes for part in documents], target)
    else:
        ranked = sorted(range(len(documents)), key=lambda i: (_name_hash(documents[i].name, seed), i))
        chosen = _closest(ranked, [document.num_bytes for document in documents], target)
    if not 0 < len(chosen) < len(documents):
        raise ValueError(
            f"cannot hold out {held_out} of {len(documents)} document(s), {total} bytes, and keep some to train on. "
            "Add documents, break a single text into lines, or lower held_out."
        )
    return (
        [document for i, document in enumerate(documents) if i not in chosen],
        [document for i, document in enumerate(documents) if i in chosen],
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


def _require_text(documents: Iterator[Document], source: str) -> Iterator[Document]:
    is_empty = True
    for document in documents:
        if document.text:
            is_empty = False
            yield document
    if is_empty:
        raise ValueError(f"text source {source!r} holds no text")


def _stdlib_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in names:
        # _sysconfigdata is how this Python was built, not source
        if _STDLIB_SKIPPED.isdisjoint(name.split("/")[:-1]) and not name.startswith("_sysconfigdata"):
            yield Document(name, _decode((root / name).read_bytes(), str(root / name)))

    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Document(f"pydoc_data/topics/{topic}", topics[topic])


def _locate(source: str) -> tuple[fs.FileSystem, str]:
    if "://" not in source:
        return fs.LocalFileSystem(), Path(source).expanduser().as_posix()
    try:
        filesystem, path = fs.FileSystem.from_uri(source)
    except (pa.ArrowInvalid, ValueError) as error:
        raise ValueError(f"text source {source!r} is no URI that pyarrow.fs knows: {error}") from error
    return filesystem, path.rstrip("/") or "/"


def _files_under(filesystem: fs.FileSystem, root: str, source: str) -> list[tuple[str, str]]:
    infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    paths = [(posixpath.relpath(info.path, root), info.path) for info in infos if info.type == fs.FileType.File]
    paths = [(name, path) for name, path in paths if not any(part.startswith(".") for part in name.split("/"))]
    files = sorted((name, path) for name, path in paths if _reader(name) is not None)
    if not files:
        suffixes = sorted({posixpath.splitext(name)[1] or "(none)" for name, _ in paths})
        raise ValueError(
            f"text source {source!r}: no file to read among {len(paths)} with suffixes [{', '.join(suffixes)}]; "
            f"known are {_known_suffixes()}"
        )
    return files


def _known_suffixes() -> str:
    return " ".join(sorted(TEXT_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES))


_Reader = Callable[[fs.FileSystem, str, str, str], Iterator[Document]]


def _reader(path: str) -> _Reader | None:
    suffix = posixpath.splitext(path)[1].lower()
    if suffix in TEXT_SUFFIXES:
        return _read_text
    if suffix in JSONL_SUFFIXES:
        return _read_jsonl
    if suffix in PARQUET_SUFFIXES:
        return _read_parquet
    return None


def _read_text(filesystem: fs.FileSystem, path: str, name: str, text_field: str) -> Iterator[Document]:
    with filesystem.open_input_stream(path, compression=None) as stream:
        yield Document(name, _decode(stream.read(), path))


def _read_jsonl(filesystem: fs.FileSystem, path: str, name: str, text_field: str) -> Iterator[Document]:
    with filesystem.open_input_stream(path, compression=None) as stream:
        offset = 0
        for number, line in enumerate(io.BufferedReader(stream, _READ_BYTES), start=1):
            where = f"{path} line {number}"
            text = _decode(line, where, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON, one object a line is expected: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
            if text_field not in row:
                raise ValueError(f"{where}: no field {text_field!r}, there are {sorted(row)}. Set text_field.")
            yield Document(f"{name}:{number}", _string(row[text_field], f"{where}, field {text_field!r}"))


def _read_parquet(filesystem: fs.FileSystem, path: str, name: str, text_field: str) -> Iterator[Document]:
    with filesystem.open_input_file(path) as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowException as error:
            raise ValueError(f"{path}: not a Parquet file: {error}") from error
        names = parquet.schema_arrow.names
        if text_field not in names:
            raise ValueError(f"{path} row 1: no column {text_field!r}, there are {sorted(names)}. Set text_field.")
        number = 0
        for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
            for scalar in batch.column(0):
                number += 1
                where = f"{path} row {number}, column {text_field!r}"
                try:
                    value = scalar.as_py()
                except UnicodeDecodeError as error:
                    raise _not_utf8(error, where, 0) from error
                yield Document(f"{name}:{number}", _string(value, where))


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise ValueError(f"{where}: lone surrogate at character {error.start}, which UTF-8 cannot write") from error
    return value


def _decode(data: bytes, where: str, offset: int = 0) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where, offset) from error


def _not_utf8(error: UnicodeDecodeError, where: str, offset: int) -> ValueError:
    return ValueError(
        f"{where}: invalid UTF-8 at byte {offset + error.start} (0x{error.object[error.start]:02x}). "
        "Convert the file to UTF-8 first."
    )

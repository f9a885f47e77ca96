"""Files of training data on any filesystem that pyarrow or fsspec knows, and their rows as named values."""

import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cu", ".go", ".java", ".js", ".rs", ".sh", ".sql", ".ts"}
)
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIXES = frozenset({".parquet"})
COMPRESSED_SUFFIXES = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
"""Of text and JSONL; Parquet compresses inside."""

LARGE_TEXT_BYTES = 8 << 20
"""A text file longer than this is read in parts, each a document of its own."""

_LARGE_PART_BYTES = 1 << 20
_PARQUET_ROWS = 256
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source. ``name`` is its path inside the source, ``path`` the one its filesystem knows."""

    name: str
    path: str
    size: int
    modified_ns: int
    """0 where the filesystem does not say."""


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """All files of a source, in the order of their names."""

    filesystem: fs.FileSystem
    files: list[SourceFile]

    def identity(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times: equal only if nothing has been written since."""
        return [(file.name, file.size, file.modified_ns) for file in self.files]


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of a file holds in the fields that were asked for."""

    name: str
    """Unique in the source and the same on every machine: ``path:n`` of a row, rows and lines from 1."""
    where: str
    """How an error names it: the path, and the line or row."""
    kind: str
    """``field`` or ``column``."""
    values: Mapping[str, Any]

    def place(self, field: str) -> str:
        """How an error names one field of the row."""
        return f"{self.where}, {self.kind} {field!r}" if self.kind else self.where

    def string(self, field: str) -> str:
        """The field as text. Raises: ValueError if it is no string or cannot be written as UTF-8."""
        value = self.values[field]
        if not isinstance(value, str):
            raise ValueError(f"{self.place(field)}: expected a string, got {type(value).__name__}")
        check_encodable(value, self.place(field))
        return value


def check_encodable(text: str, where: str) -> None:
    """Raises: ValueError for half of a surrogate pair, which JSON can escape and UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: lone surrogate at character {error.start}, which UTF-8 cannot write") from error


def find_files(source: str | Path, *, rows_only: bool = False) -> SourceFiles:
    """The files of a path or URI that can be read; nothing is opened yet.

    Args:
        source: a file or a directory (read recursively in the order of relative paths), as a path or as a URI of a
            filesystem that pyarrow (``file://``, ``s3://``, ``gs://``) or fsspec (``memory://``, ``abfs://``) knows.
        rows_only: pass over plain text, which has no rows.

    Raises:
        ValueError: the path is missing or of an unknown suffix, or nothing in a directory can be read.
    """
    source = str(source)
    if not source:
        raise ValueError("text source is an empty string. Give a file, a directory, a URI or 'stdlib'.")
    filesystem, root = _locate(source)
    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise ValueError(f"text source {source!r} does not exist. Give a file, a directory, a URI or 'stdlib'.")
    if info.type == fs.FileType.Directory:
        return SourceFiles(filesystem, _files_under(filesystem, root, source, rows_only))
    if _reader(root, rows_only) is None:
        raise ValueError(f"text source {source!r} has an unknown suffix; known are {_known_suffixes(rows_only)}")
    return SourceFiles(filesystem, [_source_file(posixpath.basename(root), info)])


def read_rows(files: SourceFiles, file: SourceFile, options: Mapping[str, str]) -> Iterator[Row]:
    """Streams the rows of one file; a text file is one row, or, if it is large, one for each of its parts ``name#k``.

    Args:
        options: the fields to read, as {name of the option that says so: field}; a text file has only the first.

    Raises:
        ValueError: while reading, for a row without a field, broken JSON or Parquet, or bytes that are not UTF-8; names
            the file and the line, row or byte.
    """
    reader = _reader(file.path, rows_only=False)
    assert reader is not None, file.path
    return reader(files.filesystem, file, options)


def _locate(source: str) -> tuple[fs.FileSystem, str]:
    if "://" not in source:
        return fs.LocalFileSystem(), Path(source).expanduser().as_posix()
    try:
        filesystem, path = fs.FileSystem.from_uri(source)
    except (pa.ArrowInvalid, ValueError) as error:
        try:
            filesystem, path = fs.FileSystem.from_uri(f"fsspec+{source}")
        except (pa.ArrowInvalid, ValueError, ImportError):
            raise ValueError(f"text source {source!r} is no URI that pyarrow.fs or fsspec knows: {error}") from error
    return filesystem, path.rstrip("/") or "/"


def _source_file(name: str, info: fs.FileInfo) -> SourceFile:
    return SourceFile(name, info.path, info.size or 0, info.mtime_ns or 0)


def _files_under(filesystem: fs.FileSystem, root: str, source: str, rows_only: bool) -> list[SourceFile]:
    infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    found = [_source_file(_relative(info.path, root), info) for info in infos if info.type == fs.FileType.File]
    found = [file for file in found if not any(part.startswith(".") for part in file.name.split("/"))]
    files = sorted((file for file in found if _reader(file.name, rows_only) is not None), key=lambda file: file.name)
    if not files:
        suffixes = sorted({posixpath.splitext(file.name)[1] or "(none)" for file in found})
        raise ValueError(
            f"text source {source!r}: no file to read among {len(found)} with suffixes [{', '.join(suffixes)}]; "
            f"known are {_known_suffixes(rows_only)}"
        )
    return files


def _relative(path: str, root: str) -> str:
    # fsspec filesystems differ in whether they give back the leading slash
    return posixpath.relpath(path.lstrip("/"), root.lstrip("/")) if root != "/" else path.lstrip("/")


def _known_suffixes(rows_only: bool) -> str:
    known = JSONL_SUFFIXES | PARQUET_SUFFIXES
    return " ".join(sorted(known if rows_only else known | TEXT_SUFFIXES))


_Reader = Callable[[fs.FileSystem, SourceFile, Mapping[str, str]], Iterator[Row]]


def _reader(path: str, rows_only: bool) -> _Reader | None:
    stem, suffix = posixpath.splitext(path.lower())
    if suffix in PARQUET_SUFFIXES:
        return _read_parquet
    if suffix in COMPRESSED_SUFFIXES:
        suffix = posixpath.splitext(stem)[1]
    if suffix in JSONL_SUFFIXES:
        return _read_jsonl
    return _read_text if suffix in TEXT_SUFFIXES and not rows_only else None


def _open_stream(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    compression = COMPRESSED_SUFFIXES.get(posixpath.splitext(path.lower())[1])
    return filesystem.open_input_stream(path, compression=compression)


def _read_text(filesystem: fs.FileSystem, file: SourceFile, options: Mapping[str, str]) -> Iterator[Row]:
    field = next(iter(options.values()))
    with _open_stream(filesystem, file.path) as stream:
        start = stream.read(LARGE_TEXT_BYTES + 1)
        if len(start) <= LARGE_TEXT_BYTES:
            yield Row(file.name, file.path, "", {field: _decode(start, file.path)})
            return
        offset = 0
        for number, part in enumerate(_parts(start, stream)):
            yield Row(f"{file.name}#{number}", file.path, "", {field: _decode(part, file.path, offset)})
            offset += len(part)


def _parts(rest: bytes, stream: pa.NativeFile) -> Iterator[bytes]:
    """Cuts at blank lines, else at a line's end, else between characters."""
    is_over = False
    while rest or not is_over:
        while len(rest) < 2 * _LARGE_PART_BYTES and not is_over:
            more = stream.read(_READ_BYTES)
            is_over = not more
            rest += more
        if len(rest) < 2 * _LARGE_PART_BYTES:
            if rest:
                yield rest
            return
        window = rest[: 2 * _LARGE_PART_BYTES]
        end = window.find(b"\n\n", _LARGE_PART_BYTES - 2) + 2
        if end < 2:
            end = window.find(b"\n", _LARGE_PART_BYTES - 1) + 1
        if end < 1:
            end = _LARGE_PART_BYTES
            while rest[end] & 0xC0 == 0x80 and end > _LARGE_PART_BYTES - 4:  # inside a character
                end -= 1
        yield rest[:end]
        rest = rest[end:]


def _read_jsonl(filesystem: fs.FileSystem, file: SourceFile, options: Mapping[str, str]) -> Iterator[Row]:
    with _open_stream(filesystem, file.path) as stream:
        offset = 0
        for number, line in enumerate(io.BufferedReader(stream, _READ_BYTES), start=1):  # pyright: ignore[reportArgumentType]
            where = f"{file.path} line {number}"
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
            for option, field in options.items():
                if field not in row:
                    raise ValueError(f"{where}: no field {field!r}, there are {sorted(row)}. Set {option}.")
            yield Row(f"{file.name}:{number}", where, "field", {field: row[field] for field in options.values()})


def _read_parquet(filesystem: fs.FileSystem, file: SourceFile, options: Mapping[str, str]) -> Iterator[Row]:
    with filesystem.open_input_file(file.path) as opened:
        try:
            parquet = pq.ParquetFile(opened)
        except pa.ArrowException as error:
            raise ValueError(f"{file.path}: not a Parquet file: {error}") from error
        names = parquet.schema_arrow.names
        for option, field in options.items():
            if field not in names:
                raise ValueError(f"{file.path} row 1: no column {field!r}, there are {sorted(names)}. Set {option}.")
        fields = list(dict.fromkeys(options.values()))
        number = 0
        for batch in _parquet_batches(parquet, fields, file.path):
            columns = [batch.column(field) for field in fields]
            for index in range(batch.num_rows):
                number += 1
                where = f"{file.path} row {number}"
                values = {f: _as_python(c[index], where, f) for f, c in zip(fields, columns, strict=True)}
                yield Row(f"{file.name}:{number}", where, "column", values)


def _parquet_batches(parquet: pq.ParquetFile, fields: list[str], path: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=fields)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged Parquet file: {error}") from error


def _as_python(scalar: pa.Scalar, where: str, field: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, f"{where}, column {field!r}", 0) from error


def _decode(data: bytes, where: str, offset: int = 0) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where, offset) from error


def decode_file(path: Path) -> str:
    """A local file as text. Raises: ValueError naming the byte that is not UTF-8."""
    return _decode(path.read_bytes(), str(path))


def _not_utf8(error: UnicodeDecodeError, where: str, offset: int) -> ValueError:
    return ValueError(
        f"{where}: invalid UTF-8 at byte {offset + error.start} (0x{error.object[error.start]:02x}). "
        "Convert the file to UTF-8 first."
    )

"""The safetensors files of a Hugging Face directory as one table of tensors, opened once and read piece by piece."""

import json
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raymoe.models.byte_ranges import RangeReader
from raymoe.models.checksums import read_checksums
from raymoe.models.config_file import one_line
from raymoe.models.landing import Landing

_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorEntry(NamedTuple):
    """Where a tensor lies and what it is, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, F8_E4M3, U8, ..."""
    start: int
    """Byte in the file."""


class Span(NamedTuple):
    """A tensor, or a row of it, as a run of bytes in a file."""

    name: str
    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    crc32: int | None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def is_aligned(self) -> bool:
        """Whether it begins at a multiple of its element's size, which the format does not promise."""
        return self.start % self.dtype.itemsize == 0

    def into(self, flat: Tensor) -> Landing:
        """To be read into `flat` [elements], or [bytes] uint8."""
        dtype = torch.uint8 if flat.dtype == torch.uint8 else self.dtype
        return Landing(self.file, self.start, dtype, flat, self.name, self.crc32)


class TensorFiles:
    """Every tensor of a directory by name. Safe to use from several threads.

    Args:
        direct_io: read past the page cache, see `RangeReader`.

    Raises:
        ValueError: no safetensors there, or the index, the checksums and the files contradict each other, or a file is damaged;
            names it.
    """

    def __init__(self, path: Path, *, direct_io: bool = False):
        self.path = path
        self.entries: dict[str, TensorEntry] = {}
        self.reader = RangeReader(direct_io=direct_io)
        index = _read_index(path)
        for file in sorted(set(index.values())) if index else ["model.safetensors"]:
            self._add_file(path / file)
        for key, file in index.items():
            if key not in self.entries or self.entries[key].file.name != file:
                raise ValueError(f"{path / _INDEX}: says that {file} holds '{key}', but it does not; fetch both again")
        self._checksums = read_checksums(path)

    def span(self, key: str, row: int | None = None) -> Span:
        """Where a tensor, or `tensor[row]`, lies.

        Raises:
            ValueError: elements of a kind that raymoe does not read.
        """
        entry = self.entries[key]
        if entry.dtype not in _DTYPES:
            raise ValueError(f"{entry.file}: tensor '{key}' holds {entry.dtype}; raymoe reads {', '.join(_DTYPES)}")
        dtype, shape, start = _DTYPES[entry.dtype], entry.shape, entry.start
        if row is not None:
            assert 0 <= row < shape[0], f"'{key}' has {shape[0]} rows, not one {row}"
            shape = shape[1:]
            start += row * prod(shape) * dtype.itemsize
        return Span(key, entry.file, start, shape, dtype, self._checksums.get((key, row)))

    def read(self, key: str, row: int | None = None) -> Tensor:
        """A tensor, or `tensor[row]`, in memory of its own on the CPU.

        Raises:
            TensorReadError: see `RangeReader.read`.
        """
        span = self.span(key, row)
        raw = torch.empty(span.num_bytes, dtype=torch.uint8)
        self.reader.read([span.into(raw)])
        return raw.view(span.dtype).view(span.shape)

    def _add_file(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"{file.parent}: no {file.name} there; raymoe reads safetensors checkpoints only")
        try:
            self.reader.open(file)
            with safe_open(file, framework="pt") as handle:
                # the library checks the header; where tensors lie it keeps to itself
                names = list(handle.keys())
            header, data_start = _read_header(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: not a whole safetensors file ({one_line(error)}); it was cut short or damaged, fetch it again"
            ) from None
        for key in names:
            if key in self.entries:
                raise ValueError(
                    f"{file.parent}: '{key}' is in {self.entries[key].file.name} and again in {file.name}; "
                    "remove one of the two"
                )
            entry = header[key]
            start = data_start + entry["data_offsets"][0]
            self.entries[key] = TensorEntry(file, tuple(entry["shape"]), entry["dtype"], start)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(the header, the byte at which tensors start).

    Source: the file format as the safetensors project documents it: length of the header, header as JSON, then the bytes.
    """
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        return json.loads(opened.read(length)), 8 + length


def _read_index(path: Path) -> dict[str, str]:
    """{tensor: file name}; empty if the directory has no index."""
    file = path / _INDEX
    if not file.is_file():
        return {}
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not readable as JSON: {one_line(error)}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{file}: no 'weight_map' of tensor names to file names in it; fetch it again")
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise ValueError(f"{file}: '{outside[0]}' is not the name of a file in that directory")
    return weight_map

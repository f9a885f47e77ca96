"""A safetensors file whose tensors arrive row by row: for layers whose experts are one tensor and more than memory holds."""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
# direct I/O reads whole blocks: experts that are whole blocks then come straight to where they are wanted
_ALIGN = 4096


class GrowingFile:
    """One safetensors file of tensors [E, ...] whose rows along the first dimension are written in any order.

    Args:
        tensors: {name: (shape, dtype)}; dtype one of float64, float32, float16, bfloat16.

    Source: the file format as the safetensors project documents it: length of the header, header as JSON, then the bytes.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]):
        self.num_bytes = 0
        """Of all tensors together."""
        self._rows = {name: set(range(shape[0])) for name, (shape, _) in tensors.items()}
        self._tensors = dict(tensors)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._starts = {}
        for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
            end = self.num_bytes + prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [self.num_bytes, end]}
            self._starts[name], self.num_bytes = self.num_bytes, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGN)
        self._data_start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._data_start + self.num_bytes)

    @property
    def is_whole(self) -> bool:
        return not any(self._rows.values())

    def write(self, name: str, row: int, tensor: Tensor) -> None:
        """Puts `tensor` [...], contiguous, in the tensor's dtype and on the CPU, at `row` of tensor `name`.

        Raises:
            ValueError: the row was written before, or there is no such row.
        """
        shape, dtype = self._tensors[name]
        assert tuple(tensor.shape) == tuple(shape[1:]), f"{name}: {tuple(tensor.shape)} is no row of {shape}"
        assert tensor.dtype == dtype, f"{name}: {tensor.dtype}, the file holds {dtype}"
        if row not in self._rows[name]:
            raise ValueError(f"'{name}': row {row} of {shape[0]} was written before, or is none of them")
        self._rows[name].remove(row)
        self._file.seek(self._data_start + self._starts[name] + row * tensor.nbytes)
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def missing(self) -> tuple[str, int]:
        """The first row that was not written: (tensor, row)."""
        return next((name, min(rows)) for name, rows in self._rows.items() if rows)

    def close(self) -> None:
        self._file.close()

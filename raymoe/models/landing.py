"""Where the bytes of one tensor go as they arrive: into memory of the caller's, cast and checked on the way."""

import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


class TensorReadError(ValueError):
    """Bytes of a tensor could not be read, or are not those that were written; names file and tensor."""


@dataclass(eq=False)
class Landing:
    """One tensor's bytes in a file and the memory they go to. For one read; not to be used again."""

    file: Path
    start: int
    """Byte in the file, a multiple of the element's size."""
    dtype: torch.dtype
    """Of the elements in the file."""
    flat: Tensor
    """[elements] contiguous, any dtype and device: the bytes are cast as they arrive."""
    name: str
    """Of the tensor, for messages."""
    crc32: int | None = None
    """Of the bytes in the file, if they are to be checked."""
    _found: int = field(default=0, repr=False)

    @property
    def stop(self) -> int:
        return self.start + self.flat.numel() * self.dtype.itemsize

    @property
    def memory(self) -> memoryview | None:
        """The bytes of `flat`, if the file's bytes can go there as they are."""
        if self.flat.dtype != self.dtype or self.flat.device.type != "cpu":
            return None
        return self.flat.view(torch.uint8).numpy().data

    def put(self, position: int, data: Tensor) -> None:
        """Takes `data` uint8, the bytes from `position` in the file on; pieces come in order."""
        first = (position - self.start) // self.dtype.itemsize
        elements = data.view(self.dtype)
        self.flat[first : first + elements.numel()].copy_(elements)
        self._sum(data)

    def check(self, was_put: bool) -> None:
        """Raises TensorReadError if the bytes are not those that were written."""
        if self.crc32 is None:
            return
        if not was_put:
            self._sum(self.flat.view(torch.uint8))
        if self._found != self.crc32:
            raise TensorReadError(
                f"{self.file}: tensor '{self.name}' is corrupt: its checksum is {self._found:08x}, written was "
                f"{self.crc32:08x}. Copy the file again; if its weights were changed on purpose, remove the checksums beside it"
            )

    def _sum(self, data: Tensor) -> None:
        if self.crc32 is not None:
            self._found = zlib.crc32(data.numpy().data, self._found)

"""A file that is read in blocks past the page cache, or, where that cannot be, through it."""

import errno
import mmap
import os
import weakref
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 4096
"""Bytes that direct I/O rounds to: a page, which no file system's block or device's sector exceeds on the machines we know."""


class OpenFile:
    """A descriptor, and what the file was when it was opened. Closed when nobody has it any more."""

    def __init__(self, path: Path, *, is_direct: bool):
        self.path = path
        self.is_direct = is_direct
        self.number = os.open(path, _flags(is_direct))
        weakref.finalize(self, os.close, self.number)
        self._seen = self._state()
        if not is_direct:
            self._expect_no_order()

    def check(self) -> None:
        """Raises OSError if the file is no longer what it was."""
        if self._state() != self._seen:
            raise OSError("the file has changed since it was opened; start again with the new one")

    def make_buffered(self) -> None:
        """The same file under the same number, through the page cache."""
        if self.is_direct:
            number = os.open(self.path, _flags(False))
            try:
                # other threads may be reading: they keep their number
                os.dup2(number, self.number, inheritable=False)
            finally:
                os.close(number)
            self.is_direct = False
            self._expect_no_order()

    def drop(self, start: int, num_bytes: int) -> None:
        """Takes a range out of the page cache."""
        if hasattr(os, "posix_fadvise"):
            begin = start - start % BLOCK
            os.posix_fadvise(self.number, begin, round_up(start + num_bytes) - begin, os.POSIX_FADV_DONTNEED)

    def _expect_no_order(self) -> None:
        """Experts are read in no order: reading ahead of one only costs."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_RANDOM)

    def _state(self) -> tuple[int, ...]:
        found = os.fstat(self.number)
        return found.st_ino, found.st_size, found.st_mtime_ns


def aligned_empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor that begins on a page, so that direct I/O may write straight into it."""
    numel = torch.Size(shape).numel()
    if not numel:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize), dtype=dtype).view(shape)


def round_up(size: int, block: int = BLOCK) -> int:
    return -(-size // block) * block


def _flags(is_direct: bool) -> int:
    direct = getattr(os, "O_DIRECT", None)
    if is_direct and direct is None:
        raise OSError(errno.EOPNOTSUPP, "no direct I/O on this system")
    return os.O_RDONLY | os.O_CLOEXEC | (direct or 0 if is_direct else 0)

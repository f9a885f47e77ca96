"""Unnamed files in memory (memfd) that several processes of a node map: nothing to unlink, gone with the last who maps them."""

import errno
import mmap
import os


class ArenaError(ValueError):
    """Shared memory cannot be made or reached; says why."""


def map_new(what: str, num_bytes: int) -> tuple[int, mmap.mmap]:
    """Allocates one for `what`, zeroed; returns (descriptor, all of it mapped to be written).

    Raises:
        ArenaError: the system has no such files, or not the memory.
    """
    if not hasattr(os, "memfd_create"):
        raise ArenaError(f"{what}: this system has no files in memory (memfd, Linux); serve without")
    number = os.memfd_create(f"raymoe-{what}", os.MFD_CLOEXEC)
    try:
        # memory that is not there shows here, not as a signal when a page is written
        os.posix_fallocate(number, 0, num_bytes)
        return number, mmap.mmap(number, num_bytes)
    except OSError as error:
        os.close(number)
        if error.errno not in (errno.ENOMEM, errno.ENOSPC):
            raise
        raise ArenaError(f"{what}: no {num_bytes} bytes of shared memory to be had; give a smaller budget") from error


def map_existing(
    what: str, pid: int, number: int, inode: int, num_bytes: int, *, is_writable: bool = False
) -> mmap.mmap:
    """Maps one that process `pid` has open as `number`.

    Raises:
        ArenaError: that process has ended, is another one by now, or is another user's or in another container.
    """
    try:
        own = os.open(f"/proc/{pid}/fd/{number}", (os.O_RDWR if is_writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise ArenaError(
            f"{what}: process {pid} that made it cannot be reached ({error.strerror}); it has ended, or is another user's or "
            "another container's"
        ) from error
    try:
        found = os.fstat(own)
        if (found.st_ino, found.st_size) != (inode, num_bytes):
            raise ArenaError(f"{what}: process {pid} is no longer the one that made it; ask for a new handle")
        # the mapping keeps the file, and has a descriptor of its own
        return mmap.mmap(own, num_bytes, access=mmap.ACCESS_WRITE if is_writable else mmap.ACCESS_READ)
    finally:
        os.close(own)

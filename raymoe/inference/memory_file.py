"""Unnamed files in memory (memfd) that several processes of a node map: nothing to unlink, gone with the last who maps them."""

import errno
import mmap
import os
from collections.abc import Iterator


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


def find_existing(what: str, num_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Files of that name and size that processes of this user have open, each once: (pid, descriptor there, inode)."""
    seen = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        for number in _listed(f"/proc/{process}/fd"):
            link = f"/proc/{process}/fd/{number}"
            try:
                if os.readlink(link) != f"/memfd:raymoe-{what} (deleted)":
                    continue
                found = os.stat(link)
            except OSError:
                # closed meanwhile
                continue
            is_ours = found.st_uid == os.getuid() and found.st_size == num_bytes
            if is_ours and found.st_ino not in seen:
                seen.add(found.st_ino)
                yield int(process), int(number), found.st_ino


def _listed(folder: str) -> list[str]:
    """Nothing of a process that is another user's, or has just ended."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


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

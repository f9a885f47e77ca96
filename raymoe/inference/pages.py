"""Memory that goes back to the system while its addresses stay."""

import ctypes
import mmap
import sys


def give_back(address: int, num_bytes: int) -> None:
    """Drops the whole pages in a range of anonymous memory; they read as zeros when they are touched again. What shares a page with
    a neighbour stays, and so does everything where the system is not Linux.

    Raises:
        OSError: the range is not mapped.
    """
    if sys.platform != "linux":
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    libc = ctypes.CDLL(None, use_errno=True)
    if size > 0 and libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "memory could not be given back to the system")

"""One arena for all engines of a node that serve the same experts: the first makes it, the others find it, nobody owns it.

It is a file in memory without a name in any directory. Whoever maps it has it open, so a newcomer finds it at any of them
(/proc), whoever made it and however that one ended; when the last has ended, it is gone.
"""

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch

from raymoe.config.precision import Precision
from raymoe.inference.arena import ArenaHandle, ArenaTier
from raymoe.inference.expert_form import ExpertForm
from raymoe.inference.memory_file import ArenaError, find_existing
from raymoe.inference.tiers import ExpertSource

_log = logging.getLogger(__name__)

_POLL_S, _TOLD_S = 0.02, 5.0


def shared_arena(fingerprint: str, precision: Precision, form: ExpertForm, source: ExpertSource) -> ArenaTier:
    """The node's arena of all experts as slots hold them, filled; made if nobody on the node has it.

    One process at a time makes and fills it; if that one ends before it is done, the next begins anew.

    Args:
        fingerprint: of the checkpoint's experts.
        precision: that experts come in from `source`.

    Raises:
        ValueError: it has to be made and there is not the memory, or an expert cannot be read.
        ArenaError: the system has no such files.
    """
    held = Precision("int8") if form.is_stored else Precision()
    dtype = torch.float32 if form.is_stored else form.compute_dtype
    key = blake2b(f"{fingerprint} {precision} {held} {dtype}".encode(), digest_size=16).hexdigest()
    name = f"arena-{key}"
    with _alone(name):
        arena = _found(name, form, held, dtype) or ArenaTier.create(form.layers, dtype=dtype, precision=held, name=name)
        try:
            arena.fill(source, is_stored=form.is_stored)
        except BaseException:
            arena.close()
            raise
    return arena


def _found(name: str, form: ExpertForm, held: Precision, dtype: torch.dtype) -> ArenaTier | None:
    num_bytes = ArenaTier.size(form.layers, dtype, held)
    for pid, number, inode in find_existing(name, num_bytes):
        handle = ArenaHandle(pid, number, inode, num_bytes, str(held), str(dtype).removeprefix("torch."), None)
        try:
            # to be written, for what is not there yet
            return ArenaTier.attach(handle, form.layers, is_writable=True)
        except ArenaError:
            # it has just ended
            continue
    return None


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Held by one process of the machine at a time; a process that ends lets go of it, however it ends.

    Source: Linux, unix(7), "Abstract sockets".
    """
    began_s = time.monotonic()
    is_told = False
    with socket.socket(socket.AF_UNIX) as lock:
        while True:
            try:
                lock.bind(f"\0raymoe-{name}")
                break
            except OSError:
                if not is_told and time.monotonic() - began_s > _TOLD_S:
                    is_told = True
                    _log.warning("another engine on this node fills the arena; waiting for it")
                time.sleep(_POLL_S)
        yield

"""The ranks of one epoch and their process groups."""

import gc
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore
from torch.distributed import distributed_c10d

_KNOCK = timedelta(seconds=2)
"""How long to try to reach a meeting: it listens already, or whoever opened it is dead."""
_leaving = threading.Lock()
_connections: dict[int, str] = {}
"""Descriptors and inodes of what connects this rank with the others."""
_meetings: dict[str, tuple[TCPStore, dict[int, str]]] = {}
"""What was opened here last, with its connections."""


@dataclass(frozen=True)
class World:
    """One rank's view of its epoch: who it is and the groups it talks through.

    Expert weights, tokens and dense gradients travel in groups of their own, so that one kind never waits behind another;
    every rank issues the collectives of a group in the same program order.
    """

    rank: int
    size: int
    device: torch.device
    nodes: tuple[int, ...]
    """Node of each rank, numbered in the order of the ranks."""
    experts: dist.ProcessGroup
    tokens: dist.ProcessGroup
    dense: dist.ProcessGroup
    snapshots: dist.ProcessGroup
    """On the CPU whatever the device, and used behind the training's back."""
    members: tuple[int, ...]
    """Who the ranks are: numbers that they keep from epoch to epoch."""
    moved_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes this rank has sent to others, by kind of collective; only ever grows."""
    link_bytes: Counter[str] = field(default_factory=Counter)
    """The same bytes by link: `near` to ranks of its own node, `far` to others."""

    def sent(self, kind: str, to: int, num_bytes: int) -> None:
        """Counts what goes to another rank."""
        self.moved_bytes[kind] += num_bytes
        self.link_bytes["near" if self.nodes[to] == self.nodes[self.rank] else "far"] += num_bytes

    def sent_around(self, kind: str, num_bytes: int) -> None:
        """Counts an all-reduce of so many bytes, as a ring sends them: to the next rank, nearly twice."""
        if self.size > 1:
            self.sent(kind, (self.rank + 1) % self.size, 2 * num_bytes * (self.size - 1) // self.size)


def open_meeting(host: str) -> str:
    """A store at which the ranks of an epoch meet. It listens when this returns: who knocks too early tries again only after some
    hundred milliseconds. Unless it has been joined, the next one that is opened here takes its place.

    Args:
        host: this process's address as the other ranks know it.

    Returns:
        Its address, for `join_world` on this rank, which is to be the first, and on all others.
    """
    before = _tcp_connections()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    address = f"tcp://{f'[{host}]' if ':' in host else host}:{store.port}"
    _meetings.clear()
    _meetings[address] = store, _connected_since(before)
    return address


def join_world(
    rendezvous: str,
    rank: int,
    size: int,
    timeout_s: float,
    device: torch.device | None = None,
    node: str | None = None,
    member: int | None = None,
) -> World:
    """Forms the process groups of an epoch; returns when all ranks have come.

    Args:
        rendezvous: what `open_meeting` gave on the first rank, or `file://path`; a fresh one for every epoch.
        timeout_s: how long to wait for the others, now and in any later collective.
        device: where this rank computes; default: the CPU.
        node: name of the machine this rank is on; default: its host name.
        member: the number that this process has in every epoch; default: its rank.

    Raises:
        torch.distributed.DistError: not all ranks came in time.
    """
    # cycles left by a former epoch, frames of its errors among them, hold groups of gloo, which poll 100 times a second each
    gc.collect()
    device = device or torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    # at once: who waits here for one that is dead is freed by closing them
    with _noting_connections():
        store = _store_at(rendezvous, size, timeout)
    try:
        with _noting_connections():
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except BaseException:
        # torch counts its groups, and meets under their numbers: a start that failed is counted, by those who came so far
        distributed_c10d._world.group_count = 0
        raise
    told: list[tuple[str, int]] = [("", 0)] * size
    dist.all_gather_object(told, (node or socket.gethostname(), rank if member is None else member))
    places = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in told))}
    experts, tokens, dense = (new_group(timeout) for _ in range(3))
    snapshots = new_group(timeout, "gloo")
    return World(
        rank, size, device, tuple(places[name] for name, _ in told), experts, tokens, dense, snapshots,
        tuple(number for _, number in told),
    )  # fmt: skip


def new_group(timeout: timedelta | None = None, backend: str | None = None) -> dist.ProcessGroup:
    """One more group of all the ranks, for every rank to ask for; `leave_world` frees those that wait in it, too."""
    with _noting_connections():
        group = dist.new_group(timeout=timeout, backend=backend)
    assert isinstance(group, dist.ProcessGroup), "every rank is in every group"
    return group


def leave_world() -> None:
    """Destroys this rank's process groups. On an error call it at once: it frees all the other ranks.

    From another thread it frees one that waits in a collective here.
    """
    with _leaving:
        # torch closes connections when nobody refers to a group any more, and a waiting thread does
        for fd, inode in _connections.items():
            _shut_down(fd, inode)
        _connections.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def _store_at(rendezvous: str, size: int, timeout: timedelta) -> Store:
    url = urlsplit(rendezvous)
    if url.scheme == "file":
        store = FileStore(url.path, size)
    elif rendezvous in _meetings:
        store, connections = _meetings.pop(rendezvous)
        with _leaving:
            _connections.update(connections)
    else:
        assert url.hostname is not None, rendezvous
        assert url.port is not None, rendezvous
        store = TCPStore(url.hostname, url.port, is_master=False, timeout=min(timeout, _KNOCK))
    store.set_timeout(timeout)
    return store


@contextmanager
def _noting_connections() -> Iterator[None]:
    before = _tcp_connections()
    yield
    with _leaving:
        _connections.update(_connected_since(before))


def _connected_since(before: dict[int, str]) -> dict[int, str]:
    return {fd: inode for fd, inode in _tcp_connections().items() if before.get(fd) != inode}


def _tcp_connections() -> dict[int, str]:
    """Descriptor and inode of this process' connections."""
    found = {}
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with suppress(OSError):  # one that has been closed meanwhile, or is connected to nothing
            inode = os.readlink(f"/proc/self/fd/{name}")
            if inode.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                        connection.getpeername()
                        found[int(name)] = inode
    return found


def _shut_down(fd: int, inode: str) -> None:
    with suppress(OSError):
        if os.readlink(f"/proc/self/fd/{fd}") == inode:
            with socket.socket(fileno=os.dup(fd)) as connection:
                connection.shutdown(socket.SHUT_RDWR)

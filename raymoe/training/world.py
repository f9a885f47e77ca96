"""The ranks of one epoch and their process groups."""

import socket
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist


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


def join_world(
    init_method: str,
    rank: int,
    size: int,
    timeout_s: float,
    device: torch.device | None = None,
    node: str | None = None,
) -> World:
    """Forms the process groups of an epoch; returns when all ranks have come.

    Args:
        init_method: `tcp://host:port` or `file://path`, fresh for every epoch.
        timeout_s: how long to wait for the others, now and in any later collective.
        device: where this rank computes; default: the CPU.
        node: name of the machine this rank is on; default: its host name.

    Raises:
        torch.distributed.DistError: not all ranks came in time.
    """
    device = device or torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size, timeout=timeout)
    names: list[str] = [""] * size
    dist.all_gather_object(names, node or socket.gethostname())
    places = {name: number for number, name in enumerate(dict.fromkeys(names))}
    experts, tokens, dense = (_new_group(timeout) for _ in range(3))
    return World(rank, size, device, tuple(places[name] for name in names), experts, tokens, dense)


def _new_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "every rank is in every group"
    return group


def leave_world() -> None:
    """Destroys this rank's process groups. On an error call it at once: the closing sockets free all the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()

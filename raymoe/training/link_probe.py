"""The links between the ranks of a world: bandwidths and latencies of torch.distributed's point-to-point transfers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from raymoe.training.probe import DeviceMeasurement, gemm, measure_device, synchronise
from raymoe.training.world import World

_SMALL_BYTES = 1024
_SMALL_ROUNDS = 10
_MOST_GEMMS = 64
_REPEATS = 5
_DUPLEX_LIMIT = 1.5
"""Both ways in less than this times one way: the link is duplex."""


@dataclass(frozen=True)
class LinkMeasurement:
    """The links of a world, the same on all ranks; None where there is no such link."""

    intra_bytes_s: int | None
    """From one device to others on its node, each way, all devices at once."""
    inter_bytes_s: int | None
    """Between nodes, each way, all devices at once: of a node if `is_nic_shared`, else of a device."""
    latency_ns: int | None
    """Of a small message from every device to every other on its node."""
    inter_latency_ns: int | None
    """The same over all nodes."""
    is_nic_shared: bool
    is_full_duplex: bool
    overlap_percent: int
    """How much of the time that GEMMs run also moves bytes."""


@dataclass(frozen=True)
class RankMeasurement:
    """What one rank of a world found out."""

    device: DeviceMeasurement
    links: LinkMeasurement


def measure_rank(world: World, nodes: Sequence[int], transfer_bytes: int, seconds: float = 0.3) -> RankMeasurement:
    """One rank's part of measuring a cluster; all ranks call it at once, so devices that share memory or cores show it.

    Args:
        nodes: node of every rank, [D].
        transfer_bytes: of one message between ranks.
        seconds: for each number of the device.
    """
    links = LinkProbe(world, nodes, transfer_bytes)
    device = measure_device(world.device, seconds)
    return RankMeasurement(device, links.measure())


class LinkProbe:
    """Measures the links of `world`; every rank makes one and calls `measure` at the same time.

    Args:
        nodes: node of every rank, [D].
        transfer_bytes: of one message; large enough that latency does not matter.
    """

    def __init__(self, world: World, nodes: Sequence[int], transfer_bytes: int):
        if len(nodes) != world.size:
            raise ValueError(f"nodes names {len(nodes)} ranks, the world has {world.size}")
        self._world = world
        self._members = [[rank for rank, node in enumerate(nodes) if node == each] for each in sorted(set(nodes))]
        self._bytes = transfer_bytes
        size = max(transfer_bytes, _SMALL_BYTES * world.size)
        self._out = torch.zeros(size, dtype=torch.uint8, device=world.device)
        self._into = torch.empty_like(self._out)
        # NCCL wants all ranks in a group's first call
        self._barrier()

    def measure(self) -> LinkMeasurement:
        """All that there is to measure between these ranks; a second or two on CPUs."""
        near = [pair for ranks in self._members for pair in _ring(ranks)]
        few = min(len(ranks) for ranks in self._members)
        has_far = len(self._members) > 1
        far = [pair for i in range(few) for pair in _ring([ranks[i] for ranks in self._members])] if has_far else []
        if not near and not far:
            return LinkMeasurement(None, None, None, None, True, True, 100)
        is_full = self._is_full_duplex(near, far)
        # a link that carries one way at a time was seen with both ways on it
        ways = 1 if is_full else 2
        intra = int(ways * self._bytes / self.exchange_s(near)) if near else None
        inter, is_shared = None, True
        if far:
            one = self._bytes / self.exchange_s(_ring([ranks[0] for ranks in self._members]))
            each = self._bytes / self.exchange_s(far)
            # what one device alone reaches, divided: half-way between all of it and an equal part of it
            is_shared = few == 1 or each < one / few**0.5
            inter = int(ways * each * (few if is_shared else 1))
        return LinkMeasurement(
            intra_bytes_s=intra,
            inter_bytes_s=inter,
            latency_ns=self._latency_ns([pair for ranks in self._members for pair in _all_pairs(ranks)]),
            inter_latency_ns=self._latency_ns(_all_pairs(range(self._world.size))) if has_far else None,
            is_nic_shared=is_shared,
            is_full_duplex=is_full,
            overlap_percent=self._overlap_percent(far or near),
        )

    def exchange_s(
        self, pairs: Sequence[tuple[int, int]], *, num_bytes: int | None = None, rounds: int = 1, gemms: int = 0
    ) -> float:
        """Seconds until the slowest rank has sent and received what `pairs` (from, to) say, and run its GEMMs meanwhile.

        The median of several; with `rounds` above 1 the mean of that many exchanges in a row.
        """
        rank, num_bytes = self._world.rank, num_bytes or self._bytes
        multiply, _ = gemm(self._world.device) if gemms else (lambda: None, 0)
        times_s = []
        for _ in range(_REPEATS + 1):
            self._barrier()
            started = time.perf_counter()
            for _ in range(rounds):
                operations = self._operations([pair for pair in pairs if rank in pair], num_bytes)
                works = dist.batch_isend_irecv(operations) if operations else []
                for _ in range(gemms):
                    multiply()
                for work in works:
                    work.wait()
            synchronise(self._world.device)
            times_s.append((time.perf_counter() - started) / rounds)
        # the first one connects and warms up
        return statistics.median(self._slowest(times_s[1:]))

    def _operations(self, pairs: Sequence[tuple[int, int]], num_bytes: int) -> list[dist.P2POp]:
        operations, group = [], self._world.experts
        sent = received = 0
        for source, target in pairs:
            if source == self._world.rank:
                message = self._out[sent : sent + num_bytes]
                operations.append(dist.P2POp(dist.isend, message, group=group, group_peer=target))
                sent += num_bytes
            else:
                message = self._into[received : received + num_bytes]
                operations.append(dist.P2POp(dist.irecv, message, group=group, group_peer=source))
                received += num_bytes
        return operations

    def _is_full_duplex(self, near: Sequence[tuple[int, int]], far: Sequence[tuple[int, int]]) -> bool:
        """Of the links between nodes if there are any: those are what plans wait for."""
        if far:
            few = min(len(ranks) for ranks in self._members)
            lines = [[ranks[i] for ranks in self._members] for i in range(few)]
        else:
            lines = self._members
        one_way = [(ranks[i], ranks[i + 1]) for ranks in lines for i in range(0, len(ranks) - 1, 2)]
        both_ways = [pair for source, target in one_way for pair in ((source, target), (target, source))]
        return self.exchange_s(both_ways) < _DUPLEX_LIMIT * self.exchange_s(one_way)

    def _latency_ns(self, pairs: Sequence[tuple[int, int]]) -> int | None:
        if not pairs:
            return None
        return int(self.exchange_s(pairs, num_bytes=_SMALL_BYTES, rounds=_SMALL_ROUNDS) * 1e9)

    def _overlap_percent(self, pairs: Sequence[tuple[int, int]]) -> int:
        """(GEMMs alone + transfer alone - both together) / the shorter of the two, with about as much of each."""
        transfer_s = self.exchange_s(pairs)
        gemms = min(max(1, round(transfer_s / self.exchange_s([], gemms=1))), _MOST_GEMMS)
        compute_s = self.exchange_s([], gemms=gemms)
        both_s = self.exchange_s(pairs, gemms=gemms)
        hidden = (compute_s + transfer_s - both_s) / min(compute_s, transfer_s)
        return round(100 * min(max(hidden, 0.0), 1.0))

    def _slowest(self, times_s: list[float]) -> list[float]:
        times = torch.tensor(times_s, dtype=torch.float64, device=self._world.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX, group=self._world.dense)
        return times.tolist()

    def _barrier(self) -> None:
        dist.barrier(group=self._world.experts)


def _ring(ranks: Sequence[int]) -> list[tuple[int, int]]:
    if len(ranks) < 2:
        return []
    return [(rank, ranks[(i + 1) % len(ranks)]) for i, rank in enumerate(ranks)]


def _all_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    return [(source, target) for source in ranks for target in ranks if source != target]

"""Measures the cluster that Ray is connected to: one probe actor a device. Thin: the measuring is in `raymoe.training`."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymoe import env
from raymoe.actors.session import ray_session, use_nodes_interface
from raymoe.errors import RunFailed
from raymoe.training.link_probe import RankMeasurement, measure_rank
from raymoe.training.world import join_world, leave_world, open_meeting

_TRANSFER_BYTES = 32 << 20
_CUDA_TRANSFER_BYTES = 256 << 20
_CPU_WORKERS_PER_NODE = 2


class ProbeFailed(RunFailed):
    """The cluster could not be measured; says why and what to do."""


@dataclass(frozen=True)
class ClusterMeasurement:
    """What the probes of all devices found, rank by rank."""

    nodes: tuple[int, ...]
    """Node of every rank."""
    is_cuda: bool
    ranks: tuple[RankMeasurement, ...]


@ray.remote
class ProbeWorker:
    """One device's probe."""

    def __init__(self, rank: int):
        logging.basicConfig(level=env.log_level())
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        use_nodes_interface()
        self._rank = rank

    def __repr__(self) -> str:
        return f"ProbeWorker[{self._rank}]"

    def rendezvous(self) -> str:
        """An address at this probe where the ranks can meet."""
        return open_meeting(ray.util.get_node_ip_address())

    def measure(
        self, rendezvous: str, nodes: list[int], transfer_bytes: int, seconds: float, timeout_s: float
    ) -> RankMeasurement:
        """Measures together with the other ranks; returns when all are done."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        world = join_world(rendezvous, self._rank, len(nodes), timeout_s, device)
        try:
            return measure_rank(world, nodes, transfer_bytes, seconds)
        finally:
            leave_world()


@contextmanager
def probe_session(workers: int | None, *, local: bool) -> Iterator[None]:
    """Connects to the Ray cluster that is up, or with `local` starts one for `workers` on this machine.

    Raises:
        ProbeFailed: there is no cluster to connect to.
    """
    if local:
        with ray_session(workers or _CPU_WORKERS_PER_NODE, own=True, dashboard=False):
            yield
        return
    try:
        ray.init(address="auto", namespace="raymoe", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise ProbeFailed(
            "no Ray cluster answers here. Start one with `ray start --head` on one machine and "
            "`ray start --address=HEAD:6379` on the others, run this on one of them or set RAY_ADDRESS, or try it on this "
            f"machine alone with --local. ({' '.join(str(error).split())[:200]})"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def probe_cluster(
    workers: int | None = None,
    *,
    transfer_bytes: int | None = None,
    seconds: float = 0.3,
    timeout_s: float = 120,
) -> ClusterMeasurement:
    """Measures the connected cluster, all devices at once, as many on each node.

    Args:
        workers: probes over all nodes; None: one a GPU, or two a node where there are none.
        transfer_bytes: of one message between devices; None: 256 MiB between GPUs, else 32 MiB.
        seconds: for each number of a device.
        timeout_s: for placing the probes, and for each collective.

    Raises:
        ValueError: a number of workers that the nodes cannot share evenly.
        ProbeFailed: the probes could not be placed or one failed.
    """
    places, is_cuda = _places(workers)
    transfer_bytes = transfer_bytes or (_CUDA_TRANSFER_BYTES if is_cuda else _TRANSFER_BYTES)
    nodes = [index for index, (_, count) in enumerate(places) for _ in range(count)]
    resources = {"num_cpus": 0, "num_gpus": 1} if is_cuda else {"num_cpus": 1}
    probes: list[ActorHandle] = []
    try:
        for rank, node in enumerate(nodes):
            affinity = NodeAffinitySchedulingStrategy(places[node][0], soft=False)
            probe: ActorHandle = ProbeWorker.options(scheduling_strategy=affinity, **resources).remote(rank)  # pyright: ignore[reportAssignmentType]
            probes.append(probe)
        calls: list[ray.ObjectRef] = [probe.rendezvous.remote() for probe in probes]
        meeting, *_ = _gather(calls, "be placed", timeout_s)
        calls = [probe.measure.remote(meeting, nodes, transfer_bytes, seconds, timeout_s) for probe in probes]
        return ClusterMeasurement(tuple(nodes), is_cuda, tuple(_gather(calls, "measure", 2 * timeout_s)))
    finally:
        for probe in probes:
            ray.kill(probe)


def _places(workers: int | None) -> tuple[list[tuple[str, int]], bool]:
    """(node, probes on it) for every node that takes part, equally many on each; and whether they are on GPUs."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"])
    for kind in ("GPU", "CPU"):
        offers = [(node["NodeID"], int(node["Resources"].get(kind, 0))) for node in alive]
        offers = [(node, count) for node, count in offers if count > 0]
        if offers:
            break
    else:
        raise ProbeFailed("the Ray cluster has no node with a GPU or a CPU to offer")
    each = min(count for _, count in offers)
    if workers is None:
        return [
            (node, each if kind == "GPU" else min(each, _CPU_WORKERS_PER_NODE)) for node, _ in offers
        ], kind == "GPU"
    if workers < 1:
        raise ValueError(f"--workers is {workers}: must be at least 1")
    used = offers[: min(workers, len(offers))]
    if workers % len(used):
        lower = workers // len(used) * len(used)
        raise ValueError(
            f"--workers is {workers}, which {len(used)} nodes cannot share evenly; take {lower} or {lower + len(used)}"
        )
    return [(node, workers // len(used)) for node, _ in used], kind == "GPU"


def _gather(refs: list[ray.ObjectRef], what: str, timeout_s: float) -> list:
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError:
        free = ray.available_resources()
        raise ProbeFailed(
            f"{len(refs)} probes could not {what} within {timeout_s:g} s; free in the cluster: {free.get('CPU', 0):g} CPUs, "
            f"{free.get('GPU', 0):g} GPUs. Free resources, or lower --workers."
        ) from None
    except RayActorError as error:
        raise ProbeFailed(f"a probe died: {' '.join(str(error).split())}") from None
    except RayTaskError as error:
        cause = error.cause
        raise ProbeFailed(f"a probe failed: {type(cause).__name__}: {' '.join(str(cause).split())}") from None
    except RayError as error:
        raise ProbeFailed(f"the probes could not {what}: {' '.join(str(error).split())}") from None

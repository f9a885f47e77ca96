"""The machines that `raymoe plan --model` plans for: described by a cluster file, or this one, measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from raymoe.cluster_file import load_cluster
from raymoe.commands.fit_text import bytes_text
from raymoe.placement import ClusterSpec
from raymoe.placement.serving import ServingMachine
from raymoe.training.probe import measure_device, measure_file_bandwidth


@dataclass(frozen=True)
class Machines:
    """What is planned for."""

    name: str
    is_measured: bool
    description: str
    spec: ClusterSpec
    serving: ServingMachine
    knows_links: bool


def described(cluster: str, nodes: int | None, devices_per_node: int | None) -> Machines:
    """The machines that a preset or a cluster file describes."""
    read = load_cluster(cluster, nodes=nodes, devices_per_node=devices_per_node)
    config, spec = read.config, read.spec
    if config.memory is None:
        raise ValueError(f"{cluster}: 'memory' is missing, so nothing can be said to fit; give it, e.g. memory: 80 GB")
    is_cpu = config.device.upper().startswith("CPU")
    far = spec.num_nodes > 1
    serving = ServingMachine(
        memory_bytes=config.memory,
        devices=spec.num_devices,
        memory_bytes_s=config.memory_bandwidth,
        flops_s=config.flops,
        has_host=not is_cpu,
        host_bytes=config.host_memory,
        host_bytes_s=config.host_bandwidth,
        file_bytes_s=config.file_bandwidth,
        link_bytes_s=spec.budget_bytes_s if spec.num_devices > 1 else None,
        link_latency_ns=spec.inter_latency_ns if far else spec.latency_ns,
    )
    return Machines(read.name, False, config.describe(), spec, serving, knows_links=True)


def this_machine(model: Path, nodes: int | None, devices_per_node: int | None) -> Machines:
    """This machine, measured in about two seconds; files only if the model's are there.

    Raises:
        ValueError: several nodes, which need a cluster file.
    """
    if nodes not in (None, 1):
        raise ValueError(
            "--nodes needs --cluster: this machine is one node. Measure a cluster with raymoe plan --measure"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.type == "cuda"
    measured = measure_device(device)
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else []
    count = devices_per_node or (torch.cuda.device_count() if is_cuda else 1)
    share = 1 if is_cuda else count
    serving = ServingMachine(
        memory_bytes=measured.memory_bytes // share,
        devices=count,
        memory_bytes_s=measured.memory_bytes_s // share,
        flops_s=measured.flops_s // share,
        has_host=is_cuda,
        host_bytes=measured.host_memory_bytes,
        host_bytes_s=measured.host_bytes_s,
        file_bytes_s=measure_file_bandwidth(files),
    )
    spec = ClusterSpec.even(1, count, intra_bytes_s=1, flops_s=serving.flops_s or 1, memory_bytes=serving.memory_bytes)
    parts = [
        f"{count} x {measured.name} with {bytes_text(serving.memory_bytes)}",
        f"{bytes_text(measured.memory_bytes_s)}/s",
    ]
    parts.append(f"{measured.flops_s / 1e12:.3g} TFLOP/s")
    if measured.host_bytes_s:
        parts.append(
            f"{bytes_text(measured.host_bytes_s)}/s from host memory ({bytes_text(measured.host_memory_bytes)})"
        )
    if serving.file_bytes_s:
        parts.append(f"{bytes_text(serving.file_bytes_s)}/s from the model's files")
    return Machines("this machine", True, ", ".join(parts), spec, serving, knows_links=count == 1)

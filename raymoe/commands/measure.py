"""`raymoe plan --measure`: the live cluster, measured and written down as a cluster file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from raymoe.actors.probe import ClusterMeasurement, probe_cluster, probe_session
from raymoe.cluster_file import ClusterConfig, write_cluster
from raymoe.telemetry import run_meta, write_json


def measure(
    output: Path, *, workers: int | None, local: bool, console: Console, command: str, json: Path | None
) -> None:
    """Measures all devices of the Ray cluster and their links, and writes `output` for `raymoe plan --cluster`.

    Args:
        workers: probes over all nodes; None: one a GPU, or two a node on CPUs.
        local: start a cluster on this machine instead of joining one.

    Raises:
        ProbeFailed: no cluster, no room, or a probe failed.
        ValueError: workers that the nodes cannot share evenly.
    """
    with console.status("measuring ..."), probe_session(workers, local=local):
        measured = probe_cluster(workers)
    config = cluster_config(measured)
    meta = run_meta(command)
    write_cluster(output, config, note=f"measured on {meta['date']}: {command}")
    rows = [{"key": key, "value": value} for key, value in config.model_dump(exclude_none=True).items()]
    for row in rows:
        console.print(f"{row['key']:<18} {row['value']}", highlight=False)
    console.print(
        f"{'written to':<18} {output}; plan with: raymoe plan --cluster {output} ...", highlight=False, soft_wrap=True
    )
    if json is not None:
        numbers = {field: getattr(config, field) for field in ClusterConfig.model_fields}
        write_json(json, command, [numbers | {"output": output}])


def cluster_config(measured: ClusterMeasurement) -> ClusterConfig:
    """The measurement as a cluster file holds it: the slowest device's numbers, since ranks wait for each other."""
    on_node = Counter(measured.nodes)
    each = on_node[0]
    devices = [rank.device for rank in measured.ranks]
    links = measured.ranks[0].links
    host_bytes = min(device.host_memory_bytes for device in devices)
    memory = min(device.memory_bytes for device in devices)
    to_device = [device.host_bytes_s for device in devices if device.host_bytes_s is not None]
    names = Counter(device.name for device in devices)
    fields = {
        "nodes": len(on_node),
        "devices_per_node": each,
        "device": names.most_common(1)[0][0],
        "flops": _round(min(device.flops_s for device in devices)),
        # ranks on a CPU share the memory of their node
        "memory": _whole_mb(memory if measured.is_cuda else memory // each),
        "intra_bandwidth": _round(links.intra_bytes_s),
        "inter_bandwidth": _round(links.inter_bytes_s),
        "latency": _text_ns(_round(links.latency_ns)),
        "inter_latency": _text_ns(_round(links.inter_latency_ns)),
        "nic": "shared" if links.is_nic_shared else "per_device",
        "duplex": "full" if links.is_full_duplex else "half",
        "overlap": links.overlap_percent,
        "memory_bandwidth": _round(min(device.memory_bytes_s for device in devices)),
        "host_memory": _whole_mb(host_bytes) if measured.is_cuda else None,
        "host_bandwidth": _round(min(to_device)) if to_device else None,
    }
    return ClusterConfig.model_validate({key: value for key, value in fields.items() if value is not None})


def _text_ns(time_ns: int | None) -> str | None:
    return None if time_ns is None else f"{time_ns} ns"


def _round(value: int | None) -> int | None:
    """To three digits: more is noise."""
    return None if value is None else int(float(f"{value:.3g}"))


def _whole_mb(value: int) -> int:
    return value // 10**6 * 10**6 or value

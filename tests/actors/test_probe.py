"""Measuring a Ray cluster, and what becomes of it in a cluster file."""

import contextlib
import io
import json

import pytest
import ray
from rich.console import Console

from raymoe.actors.probe import ClusterMeasurement, ProbeFailed, probe_cluster, probe_session
from raymoe.cluster_file import load_cluster, write_cluster
from raymoe.commands import measure as commands
from raymoe.commands.measure import cluster_config
from raymoe.training.link_probe import LinkMeasurement, RankMeasurement
from raymoe.training.probe import DeviceMeasurement


def test_two_workers_measure_a_cluster_that_plans_can_use(tmp_path):
    with probe_session(2, local=True):
        measured = probe_cluster(2, transfer_bytes=1 << 20, seconds=0.05, timeout_s=60)
        with pytest.raises(ValueError, match="--workers is 0"):
            probe_cluster(0)
        cpus = int(ray.cluster_resources()["CPU"])
        with pytest.raises(
            ProbeFailed, match=rf"{cpus + 1} probes could not be placed within 2 s; free in the cluster"
        ):
            probe_cluster(cpus + 1, timeout_s=2)
    assert measured.nodes == (0, 0)
    assert not measured.is_cuda
    assert measured.ranks[0].links == measured.ranks[1].links
    config = cluster_config(measured)
    write_cluster(tmp_path / "cluster.yaml", config, note="measured")
    read = load_cluster(tmp_path / "cluster.yaml")
    assert read.config == config
    assert read.spec.num_devices == 2
    assert read.config.memory_bandwidth
    assert read.config.intra_bandwidth


def test_no_cluster_says_how_to_start_one(monkeypatch):
    def refuse(**_):
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ProbeFailed, match=r"no Ray cluster answers here\. Start one with `ray start --head`"), \
         probe_session(None, local=False):  # fmt: skip
        pass


def test_a_cluster_is_as_fast_as_its_slowest_device():
    links = LinkMeasurement(400_123_456_789, 50_123_456_789, 30_123, 60_456, False, True, 80)
    devices = [DeviceMeasurement("H100", flops, 80 * 10**9, 3 * 10**12, 10**12, 55 * 10**9) for flops in (7, 5, 6, 8)]
    ranks = tuple(RankMeasurement(device, links) for device in devices)
    config = cluster_config(ClusterMeasurement((0, 0, 1, 1), True, ranks))
    assert (config.nodes, config.devices_per_node, config.device, config.flops) == (2, 2, "H100", 5)
    assert (config.memory, config.host_memory, config.host_bandwidth) == (80 * 10**9, 10**12, 55 * 10**9)
    assert (config.intra_bandwidth, config.inter_bandwidth) == (400 * 10**9, 501 * 10**8)
    assert (config.latency, config.inter_latency, config.overlap) == (30_100, 60_500, 80)
    assert (config.nic, config.duplex) == ("per_device", "full")
    on_cpu = cluster_config(ClusterMeasurement((0, 0, 1, 1), False, ranks))
    assert (on_cpu.memory, on_cpu.host_memory) == (40 * 10**9, None)


def test_the_command_prints_and_writes_what_was_measured(tmp_path, monkeypatch):
    links = LinkMeasurement(2 * 10**9, None, 50_000, None, True, False, 10)
    rank = RankMeasurement(DeviceMeasurement("CPU", 10**11, 10**10, 9 * 10**9, 10**10, None), links)
    asked = []
    monkeypatch.setattr(commands, "probe_session", lambda workers, local: contextlib.nullcontext(asked.append(local)))
    monkeypatch.setattr(commands, "probe_cluster", lambda workers: ClusterMeasurement((0, 0), False, (rank, rank)))
    console = Console(file=io.StringIO(), width=200)
    output, written = tmp_path / "runs" / "cluster.yaml", tmp_path / "out.json"
    commands.measure(output, workers=2, local=True, console=console, command="raymoe plan --measure", json=written)
    said = console.file.getvalue()
    assert "intra_bandwidth    2 GB/s" in said
    assert f"raymoe plan --cluster {output}" in said
    assert output.read_text().startswith("# measured on ")
    assert load_cluster(output).config.duplex == "half"
    (row,) = json.loads(written.read_text())["rows"]
    assert (row["intra_bandwidth"], row["overlap"], asked) == (2 * 10**9, 10, [True])

"""Measuring a device, files and links, on ranks without Ray."""

import pytest
import torch

from raymoe.training import probe
from raymoe.training.probe import measure_device, measure_file_bandwidth, memory_limit_bytes
from tests.training.ranks import run_ranks

CPU = torch.device("cpu")


def test_a_device_has_plausible_numbers():
    measured = measure_device(CPU, seconds=0.02)
    assert measured.name == "CPU"
    assert 10**8 < measured.flops_s < 10**14
    assert 10**8 < measured.memory_bytes_s < 10**13
    assert measured.memory_bytes == measured.host_memory_bytes == memory_limit_bytes()
    assert measured.host_bytes_s is None


def test_a_control_group_limits_memory(tmp_path, monkeypatch):
    machine = memory_limit_bytes()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(probe, "_CGROUP_LIMITS", (str(tmp_path / "absent"), str(limit)))
    limit.write_text("max\n")
    assert memory_limit_bytes() >= machine
    limit.write_text("12345\n")
    assert memory_limit_bytes() == 12345


def test_files_are_read_whole_or_until_time_is_up(tmp_path, monkeypatch):
    read = []
    original = probe._read_block
    monkeypatch.setattr(probe, "_read_block", lambda *a: read.append(original(*a)) or read[-1])
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_bytes(bytes(9 << 20))
    files[1].write_bytes(bytes(1000))
    rate = measure_file_bandwidth(files, seconds=5)
    assert rate is not None
    assert rate > 0
    assert sum(read) == (9 << 20) + 1000
    assert measure_file_bandwidth([]) is None


def _links(join, rank, nodes, transfer_bytes):
    from raymoe.training.link_probe import LinkProbe

    return LinkProbe(join(), nodes, transfer_bytes).measure()


@pytest.mark.parametrize("nodes", [[0], [0, 1], [0, 0, 1, 1]])
def test_links_are_measured_where_there_are_any(nodes):
    first, *others = run_ranks(len(nodes), _links, nodes, 1 << 20)
    assert all(other == first for other in others), "ranks must come to the same numbers"
    has_near, has_far = nodes.count(0) > 1, len(set(nodes)) > 1
    assert (first.intra_bytes_s is not None, first.latency_ns is not None) == (has_near, has_near)
    assert (first.inter_bytes_s is not None, first.inter_latency_ns is not None) == (has_far, has_far)
    assert 0 <= first.overlap_percent <= 100
    for bandwidth in filter(None, (first.intra_bytes_s, first.inter_bytes_s)):
        assert 10**7 < bandwidth < 10**12


class _Scripted:
    """Times of a cluster whose links are made up: 1 s a byte and direction, shared as told."""

    def __init__(self, nodes, *, duplex=True, shared=True, compute_s=0.5, overlap=1.0):
        from raymoe.training.link_probe import LinkProbe

        self.probe = LinkProbe.__new__(LinkProbe)
        self.probe._members = [[r for r, n in enumerate(nodes) if n == each] for each in sorted(set(nodes))]
        self.probe._bytes = 1000
        self.probe._world = type("World", (), {"size": len(nodes)})
        self.probe.exchange_s = self.exchange_s
        self.nodes, self.duplex, self.shared = nodes, duplex, shared
        self.compute_s, self.overlap = compute_s, overlap

    def exchange_s(self, pairs, *, num_bytes=None, rounds=1, gemms=0):
        links = {}
        for source, target in pairs:
            far = self.nodes[source] != self.nodes[target]
            for end, way in ((source, "out"), (target, "in")):
                owner = (far, self.nodes[end] if far and self.shared else end, way if self.duplex else "any")
                links[owner] = links.get(owner, 0) + 1
        moving = max(links.values(), default=0)
        computing = gemms * self.compute_s
        hidden = self.overlap * min(moving, computing)
        return moving + computing - hidden or 1e-3


def test_nic_duplex_and_overlap_are_told_apart():
    four = [0, 0, 0, 0, 1, 1, 1, 1]
    shared = _Scripted(four).probe.measure()
    assert (shared.is_nic_shared, shared.is_full_duplex, shared.overlap_percent) == (True, True, 100)
    assert (shared.inter_bytes_s, shared.intra_bytes_s) == (1000, 1000)
    own = _Scripted(four, shared=False, overlap=0.25).probe.measure()
    assert (own.is_nic_shared, own.inter_bytes_s, own.overlap_percent) == (False, 1000, 25)
    half = _Scripted(four, duplex=False, overlap=0.0).probe.measure()
    assert (half.is_full_duplex, half.overlap_percent) == (False, 0)
    # one way at a time a link moves 1000; the planner charges both ways to it
    assert (half.inter_bytes_s, half.intra_bytes_s) == (1000, 1000)
    assert not _Scripted([0, 0], duplex=False).probe.measure().is_full_duplex


def test_ranks_and_nodes_must_agree():
    with pytest.raises(ValueError, match="nodes names 2 ranks, the world has 1"):
        run_ranks(1, _links, [0, 0], 1000)

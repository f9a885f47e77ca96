"""A chain of tiers answers whatever one of them does, says so once, and knows how fast each of them is."""

import logging
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymoe.inference import tier_rate
from raymoe.inference import tiers as module
from raymoe.inference.tier_rate import TierRate, fit, measure
from raymoe.inference.tiers import CheckpointTier, NotHeld, TierError, Tiers
from raymoe.models import load_without_experts

LAYERS, EXPERTS, NUMEL = 3, 4, 16


class Memory:
    """Expert e of layer l is full of 100 l + e, but for those that it does not hold or cannot deliver."""

    def __init__(self, held=None, error=None, bytes_per_s=None, sleep=time.sleep):
        self.held, self.error, self.bytes_per_s, self.sleep = held, error, bytes_per_s, sleep
        self.asked = []

    def read(self, layer, expert, out):
        self.asked.append((layer, expert))
        if self.held is not None and (layer, expert) not in self.held:
            raise NotHeld
        if self.error is not None:
            out.fill_(-1)
            raise self.error
        if self.bytes_per_s:
            self.sleep(0.002 + out.nbytes / self.bytes_per_s)
        out.fill_(100 * layer + expert)
        return out.nbytes


def read(source, layer, expert):
    out = torch.zeros(NUMEL)
    source.read(layer, expert, out)
    return out


def stats(tiers):
    return {s.name: (s.reads, s.absent, s.failures, s.passed_over) for s in tiers.stats()}


def test_the_nearest_tier_that_has_it_answers():
    near, file = Memory(held={(1, 2)}), Memory()
    tiers = Tiers({"arena": near, "file": file})
    for layer, expert in [(1, 2), (1, 3), (1, 2)]:
        assert (read(tiers, layer, expert) == 100 * layer + expert).all()
    assert file.asked == [(1, 3)]
    assert stats(tiers) == {"arena": (2, 1, 0, 0), "file": (1, 0, 0, 0)}
    assert [s.bytes for s in tiers.stats()] == [2 * NUMEL * 4, NUMEL * 4]


def test_a_failure_is_answered_by_the_next_tier_and_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 100)
    near = Memory(error=ConnectionError("host 3 is gone"))
    tiers = Tiers({"host": near, "file": Memory()})
    with caplog.at_level(logging.WARNING, "raymoe"):
        for expert in range(EXPERTS):
            assert (read(tiers, 2, expert) == 200 + expert).all()
        assert caplog.text.count("tier 'host' failed (expert 0 of MoE layer 2): ConnectionError: host 3 is gone") == 1
        assert len(caplog.records) == 1
        near.error = TimeoutError("too slow")
        read(tiers, 2, 0)
    assert len(caplog.records) == 2
    assert stats(tiers)["host"] == (0, 0, EXPERTS + 1, 0)
    assert tiers.stats()[0].last_error == "TimeoutError: too slow"


def test_a_tier_that_keeps_failing_rests_and_comes_back(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_REST_S", 0.2)
    near = Memory(error=ConnectionError("gone"))
    tiers = Tiers({"host": near, "file": Memory()})
    for _ in range(6):
        read(tiers, 0, 1)
    assert stats(tiers)["host"] == (0, 0, 3, 3)
    near.error = None
    time.sleep(0.25)
    read(tiers, 0, 1)
    read(tiers, 0, 1)
    assert stats(tiers) == {"host": (2, 0, 3, 3), "file": (6, 0, 0, 0)}


def test_reads_that_fail_together_are_one_failure():
    count = 8
    all_here = threading.Barrier(count)

    class Together(Memory):
        def read(self, layer, expert, out):
            all_here.wait(10)
            raise ConnectionError("gone")

    tiers = Tiers({"host": Together(), "file": Memory()})
    threads = [threading.Thread(target=read, args=(tiers, 0, 0)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats(tiers) == {"host": (0, 0, count, 0), "file": (count, 0, 0, 0)}
    tiers._tiers[0].source = Memory()
    read(tiers, 0, 0)
    assert stats(tiers)["host"] == (1, 0, count, 0)


def test_the_last_tier_never_rests_and_its_error_is_told():
    tiers = Tiers({"arena": Memory(held=set()), "file": Memory(error=OSError("Input/output error"))})
    for _ in range(5):
        with pytest.raises(
            TierError,
            match=r"expert 3 of MoE layer 1: no tier could deliver it \(arena: does not have it; file: Input/output error\)",
        ):
            read(tiers, 1, 3)
    assert stats(tiers)["file"] == (0, 0, 5, 0)


def test_our_own_mistakes_are_not_answered_for():
    with pytest.raises(AssertionError, match="cannot happen"):
        read(Tiers({"a": Memory(error=AssertionError("cannot happen")), "b": Memory()}), 0, 0)
    with pytest.raises(ValueError, match="must be at least one"):
        Tiers({})


def test_counts_hold_with_several_threads():
    tiers = Tiers({"some": Memory(held={(0, 0), (0, 1)}), "file": Memory()})
    threads = [
        threading.Thread(target=lambda: [read(tiers, 0, expert) for _ in range(200) for expert in range(EXPERTS)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats(tiers) == {"some": (1600, 1600, 0, 0), "file": (1600, 0, 0, 0)}


@given(latency_s=st.floats(0, 1e-2), bytes_per_s=st.floats(1e6, 1e11), small=st.integers(1, 10**4))
def test_a_line_is_found_again(latency_s, bytes_per_s, small):
    exact = TierRate(bytes_per_s, latency_s, 6)
    sizes = (small, small * 100, small * 1000)
    found = fit({size: [9.0, exact.seconds(size), exact.seconds(size)] for size in sizes})
    for size in sizes:
        # what does not differ in the last bits of a float cannot be told apart
        assert found.seconds(size) == pytest.approx(exact.seconds(size), rel=1e-3)
    assert found.reads == 9


def test_sizes_that_cannot_be_told_apart_give_no_latency():
    assert fit({1000: [0.5, 0.1, 0.1]}) == TierRate(1e4, 0.0, 3, 0.1)
    assert fit({1000: [0.1], 2000: [0.1]}) == TierRate(2e4, 0.0, 2, 0.1)


def test_a_source_is_measured_in_a_bounded_time(monkeypatch):
    now_s = 0.0

    def sleep(seconds):
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr(tier_rate.time, "perf_counter", lambda: now_s)
    numel = [2_000, 20_000, 20_000]
    rate = measure(Memory(bytes_per_s=20e6, sleep=sleep), numel, [500] * 3, torch.float32, limit_s=0.15)
    assert rate == pytest.approx((20e6, 0.002, rate.reads, 0.002 + 80_000 / 20e6))
    # the longest read takes 6 ms
    assert 0.15 <= now_s < 0.156
    assert rate.reads > 20


def test_every_tier_is_measured_or_says_why_not(caplog):
    tiers = Tiers({"empty": Memory(held=set()), "gone": Memory(error=ConnectionError("gone")), "file": Memory()})
    rates = tiers.measure([NUMEL] * LAYERS, [EXPERTS] * LAYERS, torch.float32, limit_s=0.03)
    assert list(rates) == ["file"]
    assert [s.rate for s in tiers.stats()] == [None, None, rates["file"]]
    assert "tier 'gone' failed (measuring it): ConnectionError: gone" in caplog.text
    with pytest.raises(LookupError, match="holds no expert"):
        measure(Memory(held=set()), [NUMEL], [EXPERTS], torch.float32)


def test_the_files_are_a_tier(saved_model):
    _, files = load_without_experts(saved_model("olmoe")[1], torch.float32, direct_io=True)
    tiers = Tiers({"file": CheckpointTier(files)})
    numel = [layer.layout.numel for layer in files.layers]
    rate = tiers.measure(numel, [8, 8], torch.float32, limit_s=0.1)["file"]
    assert 1e5 < rate.bytes_per_s < 1e11
    before = files.reader.counters.needed_bytes
    out = torch.zeros(numel[1])
    moved_bytes = tiers.read(1, 5, out)
    assert tiers.facts()["file"]["needed_bytes"] == before + moved_bytes
    assert tiers.facts()["file"]["mode"] in ("direct", "dropped")
    wanted = torch.zeros(numel[1])
    files.read(1, 5, wanted)
    assert torch.equal(out, wanted)


class Timed(Memory):
    """Takes as long as it is told to."""

    def __init__(self, took_s, held=None):
        super().__init__(held)
        self.took_s = took_s

    def read(self, layer, expert, out):
        time.sleep(self.took_s)
        return super().read(layer, expert, out)


def test_the_fastest_as_measured_is_asked_first():
    hosts, file = Timed(0.01), Timed(0.0)
    tiers = Tiers({"hosts": hosts, "file": file})
    tiers.measure([NUMEL] * LAYERS, [EXPERTS] * LAYERS, torch.float32, limit_s=0.1)
    hosts.asked, file.asked = [], []
    for expert in range(EXPERTS):
        read(tiers, 0, expert)
    assert (hosts.asked, len(file.asked)) == ([], EXPERTS)
    # the file gets slow: the median of its last reads says so
    file.took_s = 0.03
    for _ in range(6):
        read(tiers, 0, 0)
    hosts.asked = []
    read(tiers, 1, 1)
    assert hosts.asked == [(1, 1)]
    hosts.held = set()
    assert (read(tiers, 1, 2) == 102).all()


def test_one_slow_read_is_not_enough_to_lose_a_place():
    hosts, file = Timed(0.02, held=set()), Timed(0.0)
    tiers = Tiers({"hosts": hosts, "file": file})
    read(tiers, 0, 0)
    hosts.held, hosts.asked, file.asked = None, [], []
    for _ in range(5):
        read(tiers, 0, 0)
    assert (len(hosts.asked), len(file.asked)) == (3, 2)


def test_a_tier_that_held_nothing_at_the_start_is_measured_when_it_does(monkeypatch):
    hosts, file = Timed(0.0, held=set()), Timed(0.003)
    tiers = Tiers({"hosts": hosts, "file": file})
    assert tiers.measure([NUMEL] * LAYERS, [EXPERTS] * LAYERS, torch.float32, limit_s=0.05).keys() == {"file"}
    read(tiers, 0, 0)
    hosts.held = None
    file.asked = []
    for expert in range(EXPERTS):
        read(tiers, 0, expert)
    assert file.asked == []
    # slower than the file: found out once, and again when that is long ago
    hosts.took_s = 0.02
    for _ in range(12):
        read(tiers, 0, 0)
    assert 0 < len(file.asked) < 12
    monkeypatch.setattr(module, "_FRESH_S", 0.0)
    hosts.asked = []
    read(tiers, 0, 0)
    assert hosts.asked == [(0, 0)]

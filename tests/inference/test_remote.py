"""Experts held elsewhere: whatever their holders do, what arrives is right or comes from the next tier. Holders in this process."""

# ruff: noqa: F811  (fixtures that are imported)

import os
import threading

import pytest
import torch

from raymoe.inference import InferenceEngine, SamplingParams
from raymoe.inference.holding import Holding
from raymoe.inference.remote import CorruptExpert, HostTier, NodeTier
from raymoe.inference.tier_rate import TierRate
from raymoe.inference.tiers import NotHeld
from tests.inference.conftest import generate_alone, random_prompts
from tests.inference.local_hosts import ALL, LocalHosts, experts, hold, until  # noqa: F401

DEAR = TierRate(1e12, 1.0, 1)


def test_what_arrives_wrong_is_not_taken(experts, hold):
    holding = hold()
    until(lambda: holding.is_settled)
    numel = [layer.layout.numel for layer in experts[0]]

    def flipped(parcel):
        data = parcel.data.copy()
        data[1234] ^= 1
        return parcel._replace(data=data)

    def read(spoil):
        out = torch.zeros(numel[1])
        HostTier(LocalHosts(holding, spoil=spoil), numel, torch.float32).read(1, 3, out)
        return out

    assert torch.equal(read(lambda parcel: parcel), experts[2][1][3])
    with pytest.raises(CorruptExpert, match=r"expert 3 of MoE layer 1 arrived with checksum [0-9a-f]{8}, sent was"):
        read(flipped)
    with pytest.raises(CorruptExpert, match=rf"came with {numel[1] * 4 - 4} bytes, but has {numel[1] * 4}"):
        read(lambda parcel: parcel._replace(data=parcel.data[:-4]))


def test_an_expert_is_cast_to_the_slots_dtype(experts, hold):
    holding = hold()
    until(lambda: holding.is_settled)
    out = torch.zeros(experts[0][0].layout.numel, dtype=torch.bfloat16)
    HostTier(LocalHosts(holding), [out.numel()] * 2, torch.float32).read(0, 6, out)
    assert torch.equal(out, experts[2][0][6].bfloat16())


def test_hosts_on_the_node_are_read_without_a_call_and_let_go(experts, hold):
    hosts = LocalHosts(hold(keys=ALL[:8]), hold(keys=ALL[8:]), is_near=True)
    until(lambda: all(h.is_settled for h in hosts.holdings))
    node = NodeTier(hosts)
    out = torch.zeros(experts[0][1].layout.numel)
    node.read(1, 2, out)
    assert torch.equal(out, experts[2][1][2])
    assert node.facts() == {"mapped_hosts": 2}
    assert node.holds(0, 0)
    gone = hosts.holdings.pop(0)
    assert not node.holds(0, 0)
    gone.close()
    # one that ended before anybody knew: it is passed over
    hosts.holdings.append(gone)
    with pytest.raises(NotHeld, match="no host on this node holds expert 0 of MoE layer 0"):
        node.read(0, 0, out)
    assert node.facts() == {"mapped_hosts": 1}
    node.close()


PROMPTS = random_prompts([4, 11, 7], seed=5)


@pytest.fixture
def tokens(saved_model, tiers_in_order):
    """Makes an engine for hosts, and returns (its tokens are right, its statistics)."""

    def run(hosts, **options):
        model, path = saved_model("olmoe")
        settings = {"expert_memory": "20%", "max_batch_tokens": 64, "kv_tokens": 1024, "predictors": ()} | options
        with InferenceEngine(path, remote=hosts, device="cpu", **settings) as engine:
            # the tiers have been measured
            hosts.spoil.is_armed = True
            found = engine.generate(PROMPTS, SamplingParams(max_tokens=16, temperature=0.0, stop_token_ids=()))
            stats = engine.stats()
        assert hosts.is_closed
        assert found == [generate_alone(model, prompt, 16) for prompt in PROMPTS]
        return stats, {tier["name"]: tier for tier in stats["tiers"]}

    return run


def test_an_engine_takes_experts_from_hosts_and_what_they_lack_from_files(hold, tokens):
    half = hold(keys=ALL[::2])
    until(lambda: half.is_settled)
    stats, tiers = tokens(LocalHosts(half))
    assert list(tiers) == ["node", "hosts", "file"]
    assert tiers["hosts"]["reads"] > 0
    assert tiers["file"]["reads"] == tiers["hosts"]["absent"] > 0
    assert stats["fetched_bytes"] == tiers["hosts"]["bytes"] + tiers["file"]["bytes"]
    _, tiers = tokens(LocalHosts(half, is_near=True))
    assert tiers["node"]["reads"] > 0
    assert tiers["hosts"]["reads"] == 0


class Faults:
    """Spoils every third answer, another way each time."""

    def __init__(self):
        self.seen = self.spoilt = 0
        self.is_armed = False

    def __call__(self, answer):
        if not self.is_armed:
            return answer
        self.seen += 1
        if self.seen % 3:
            return answer
        self.spoilt += 1
        kind = self.spoilt % 4
        if kind == 0:
            raise TimeoutError("has not answered for 5 s")
        if kind == 1:
            raise ConnectionError("the host is gone")
        data = answer.data.copy()
        if kind == 2:
            return answer._replace(data=data[: data.size // 2])
        data[data.size // 2] ^= 0x80
        return answer._replace(data=data)


def test_whatever_a_host_does_the_tokens_are_right_and_it_is_counted(hold, tokens):
    holding = hold()
    until(lambda: holding.is_settled)
    faults = Faults()
    _, tiers = tokens(LocalHosts(holding, spoil=faults), expert_memory="10%")
    assert faults.spoilt >= 4
    assert tiers["hosts"]["failures"] == tiers["file"]["reads"] == faults.spoilt
    assert tiers["hosts"]["reads"] == faults.seen - faults.spoilt


def test_rows_are_sent_where_that_is_cheaper(hold, tokens):
    holding = hold()
    until(lambda: holding.is_settled)
    # an expert has 6 KB, a row 256 bytes there and back: at 1 MB/s bringing takes 6 ms, sending 0.3 ms
    hosts = LocalHosts(holding, way=TierRate(1e6, 1e-5, 1))
    stats, tiers = tokens(hosts, on_miss="send")
    sent = stats["sent"]
    assert sent["experts"] == sum(len(experts) for _, _, experts, _ in hosts.sent) > 0
    assert sent["rows"] == sum(sum(counts) for _, _, _, counts in hosts.sent)
    assert sent["bytes"] == sent["rows"] * 32 * 4 * 2
    assert sent["failures"] == 0
    assert tiers["file"]["reads"] == 0
    assert stats["resident_experts"] == stats["hits"] == 0


def test_experts_that_would_serve_for_long_are_brought(hold, tokens):
    holding = hold()
    until(lambda: holding.is_settled)
    # there is room for all of them, so that a fetch is paid once and used in every step; a call takes its second either way
    stats, _ = tokens(LocalHosts(holding, way=DEAR), on_miss="send", expert_memory="100%")
    sent = stats["sent"]
    assert sent["fetch_share"] < 0.5
    assert sent["kept_experts"] > 0
    assert stats["hits"] > sent["experts"] > 0


def test_what_is_on_the_node_is_not_sent_for(hold, tokens):
    holding = hold()
    until(lambda: holding.is_settled)
    hosts = LocalHosts(holding, is_near=True, way=TierRate(1e6, 1e-5, 1))
    _, tiers = tokens(hosts, on_miss="send")
    assert not hosts.sent
    assert tiers["node"]["reads"] > 0


def test_a_host_that_fails_while_it_computes_costs_a_detour(hold, tokens):
    holding = hold()
    until(lambda: holding.is_settled)
    seen = []

    def spoil(answer):
        seen.append(answer)
        if hasattr(answer, "seconds") and len(seen) % 2:
            raise ConnectionError("the host is gone")
        return answer

    stats, _ = tokens(LocalHosts(holding, spoil=spoil, way=TierRate(1e6, 1e-5, 1)), on_miss="send")
    assert stats["sent"]["failures"] > 0
    assert stats["misses"] >= stats["sent"]["failures"]


def test_sending_needs_hosts(saved_model):
    with pytest.raises(ValueError, match="on_miss: 'send' needs hosts that hold experts; set expert_hosts"):
        InferenceEngine(saved_model("olmoe")[1], on_miss="send", device="cpu")


def num_left() -> tuple[int, int, int]:
    """(threads, open descriptors, shared experts that are mapped) of this process."""
    with open("/proc/self/maps") as file:
        mapped = sum("raymoe-shared-experts" in line for line in file)
    return threading.active_count(), len(os.listdir("/proc/self/fd")), mapped


def test_nothing_is_left_behind(experts):
    before = num_left()
    for _ in range(3):
        holding = Holding(experts[0], experts[1], memory="50%", dtype=torch.float32)
        holding.hold(ALL)
        until(lambda: holding.is_settled)  # noqa: B023
        hosts = LocalHosts(holding, is_near=True)
        node = NodeTier(hosts)
        node.read(*ALL[0], torch.zeros(experts[0][0].layout.numel))
        node.close()
        holding.close()
        holding.close()
    assert num_left() == before

"""Experts held elsewhere: whatever their holders do, what arrives is right or comes from the next tier. Holders in this process."""

import os
import threading
import time

import numpy as np
import pytest
import torch

from raymoe.inference import InferenceEngine, SamplingParams
from raymoe.inference.holding import Holding
from raymoe.inference.remote import CorruptExpert, HostSpeed, HostTier, NodeTier
from raymoe.inference.shared_slots import SharedSlots
from raymoe.inference.tier_rate import TierRate
from raymoe.inference.tiers import CheckpointTier, NotHeld
from raymoe.kernels import expert_rows, plan
from raymoe.models import expert_parameters, load_without_experts, moe_layers, weights_of
from tests.inference.conftest import generate_alone, random_prompts

ALL = [(layer, expert) for layer in range(2) for expert in range(8)]
CHEAP, DEAR = TierRate(1e12, 0.0, 1), TierRate(1e12, 1.0, 1)


@pytest.fixture
def model(saved_model):
    """(layers, the files as a tier, [experts of a layer, flat])"""
    model, path = saved_model("olmoe")
    _, files = load_without_experts(path, torch.float32)
    flat = []
    for layer in moe_layers(model):
        flat.append(torch.zeros(layer.num_experts, layer.layout.numel))
        layer.layout.pack(expert_parameters(layer), flat[-1])
    return files.layers, CheckpointTier(files), flat


@pytest.fixture
def hold(model):
    """Makes holdings that are closed at the end of the test."""
    made = []

    def make(memory="100%", keys=ALL, source=None) -> Holding:
        made.append(Holding(model[0], source or model[1], memory=memory, dtype=torch.float32))
        made[-1].hold(keys)
        return made[-1]

    yield make
    for holding in made:
        holding.close()


def until(check, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


class LocalHosts:
    """`RemoteExperts` whose hosts are holdings of this process; `spoil` may change or refuse what they answer."""

    def __init__(self, *holdings, is_near=False, spoil=None, way=CHEAP):
        self.holdings, self.is_near, self.way = list(holdings), is_near, way
        self.spoil = spoil or (lambda answer: answer)
        self.given, self.sent = [], []
        self.is_closed = False

    def on_node(self):
        return [h.handle for h in self.holdings] if self.is_near else []

    def holder(self, layer, expert):
        return next((n for n, h in enumerate(self.holdings) if h.held()[layer, expert]), None)

    def give(self, layer, expert):
        host = self.holder(layer, expert)
        if host is None:
            raise NotHeld("nobody")
        self.given.append((layer, expert))
        return self.spoil(self.holdings[host].give([(layer, expert)])[0])

    def send(self, host, layer, rows, experts, counts):
        self.sent.append((host, layer, list(experts), list(counts)))
        hosts = self

        class Sent:
            def wait(self):
                data = hosts.holdings[host].compute(
                    layer, rows.numpy().view(np.uint8).ravel(), rows.dtype, experts, counts
                )
                data = hosts.spoil(data)
                return torch.from_numpy(data.rows.copy()).view(rows.dtype).view(rows.shape)

        return Sent()

    def speed(self, host):
        return HostSpeed(self.way, 0.0, 0.0)

    def facts(self):
        return {"given": len(self.given)}

    def close(self):
        self.is_closed = True


def test_shared_slots_are_read_by_who_maps_them_and_only_what_is_published():
    with SharedSlots.create(3, [10, 20], [4, 5], torch.float32) as slots:
        slots.clear(1)[:20] = 7.0
        with SharedSlots.attach(slots.handle) as mapped:
            out = torch.zeros(20)
            with pytest.raises(NotHeld, match="no slot holds expert 4 of MoE layer 1"):
                mapped.read(1, 4, out)
            slots.publish(1, (1, 4))
            assert mapped.read(1, 4, out) == 80
            assert (out == 7).all()
            assert mapped.holds(1, 4)
            assert not mapped.holds(1, 3)
            slots.clear(1)
            assert not mapped.holds(1, 4)


def test_a_slot_that_is_rewritten_under_a_reader_is_never_half_read():
    numel = 200_000
    with SharedSlots.create(1, [numel], [2], torch.float32) as slots, SharedSlots.attach(slots.handle) as mapped:
        is_over = threading.Event()

        def rewrite():
            while not is_over.is_set():
                for expert in (0, 1):
                    slots.clear(0)[:numel] = expert
                    slots.publish(0, (0, expert))
                    time.sleep(0.0002)

        writer = threading.Thread(target=rewrite)
        writer.start()
        whole = broken = 0
        try:
            deadline_s, out = time.monotonic() + 20, torch.empty(numel)
            while (whole < 50 or broken < 5) and time.monotonic() < deadline_s:
                try:
                    mapped.read(0, 1, out)
                except NotHeld:
                    broken += 1
                    continue
                whole += 1
                assert (out == 1).all()
        finally:
            is_over.set()
            writer.join()
        assert whole >= 50
        assert broken >= 5


def test_a_holding_reads_the_hottest_first_and_gives_what_it_has(model, hold):
    begun, may_go_on = [], threading.Event()

    class Slow:
        def read(self, layer, expert, out):
            begun.append((layer, expert))
            if len(begun) > 2:
                assert may_go_on.wait(20)
            return model[1].read(layer, expert, out)

    holding = hold(keys=[(1, 5), (0, 2), (1, 0)], source=Slow())
    until(lambda: len(begun) == 3)
    first, second, missing = holding.give([(0, 2), (1, 5), (1, 0)])
    assert begun == [(1, 5), (0, 2), (1, 0)]
    assert missing is None
    assert not holding.is_settled
    assert torch.equal(torch.from_numpy(first.data.copy()).view(torch.float32), model[2][0][2])
    assert torch.equal(torch.from_numpy(second.data.copy()).view(torch.float32), model[2][1][5])
    may_go_on.set()
    until(lambda: holding.is_settled)
    assert np.argwhere(holding.held()).tolist() == [[0, 2], [1, 0], [1, 5]]


def test_a_holding_that_is_told_otherwise_keeps_to_its_memory(hold):
    holding = hold(memory="25%", keys=ALL[:4])
    until(lambda: holding.is_settled)
    assert holding.num_slots == 4
    # one of the old four is still wanted, and stays; what was given a moment ago stays for a while
    holding.give([ALL[0]])
    holding.hold([ALL[3], *ALL[10:13]])
    time.sleep(0.1)
    until(lambda: holding.is_settled)
    assert np.argwhere(holding.held()).tolist() == [list(key) for key in (ALL[3], *ALL[10:13])]
    assert holding.facts()["held"] == 4
    # more than there is room for: the hottest
    holding.hold(ALL)
    until(lambda: holding.is_settled)
    assert np.argwhere(holding.held()).tolist() == [list(key) for key in ALL[:4]]


def test_what_cannot_be_held_is_refused(model, hold):
    with pytest.raises(
        ValueError, match=r"expert_hosts.memory: 1KiB is 1024 bytes, less than one expert takes; give at least"
    ):
        hold(memory="1KiB")
    with pytest.raises(ValueError, match="there is no expert 8 in MoE layer 1"):
        hold(keys=[(1, 8)])


def test_an_expert_that_cannot_be_read_leaves_the_others(model, hold, caplog):
    class Broken:
        def read(self, layer, expert, out):
            if (layer, expert) == (0, 1):
                raise OSError("Input/output error")
            return model[1].read(layer, expert, out)

    holding = hold(source=Broken())
    until(lambda: holding.held().sum() == 15)
    assert not holding.held()[0, 1]
    assert "expert 1 of MoE layer 0 cannot be read: Input/output error" in caplog.text


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "mixtral"])
def test_rows_are_computed_as_the_engine_does_bit_by_bit(saved_model, family):
    model, path = saved_model(family)
    _, files = load_without_experts(path, torch.float32)
    layer = files.layers[1]
    flat = torch.zeros(layer.num_experts, layer.layout.numel)
    layer.layout.pack(expert_parameters(moe_layers(model)[1]), flat)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 32, generator=generator)
    routed = plan(torch.randint(0, layer.num_experts, (9, 2), generator=generator), layer.num_experts)
    gate_up, down, biases = weights_of(layer, layer.layout.views(flat))
    wanted = hidden.new_empty(18, 32)
    experts = routed.offsets.diff().nonzero().flatten().tolist()
    expert_rows(hidden, gate_up, down, routed, experts, out=wanted, spec=layer.spec, biases=biases)
    holding = Holding(files.layers, CheckpointTier(files), memory="100%", dtype=torch.float32)
    try:
        # in another order than their numbers', so that slots are not experts
        holding.hold([(1, expert) for expert in reversed(experts)])
        until(lambda: holding.is_settled)
        rows = hidden[routed.token].numpy().view(np.uint8).ravel()
        counts = [int(routed.offsets[e + 1] - routed.offsets[e]) for e in experts]
        found, seconds = holding.compute(1, rows, torch.float32, experts, counts)
        assert torch.equal(torch.from_numpy(found).view(torch.float32).view(18, 32), wanted)
        assert seconds > 0
        assert holding.facts()["computed_rows"] == 18
        with pytest.raises(NotHeld, match="does not hold expert 0 of MoE layer 0"):
            holding.compute(0, rows, torch.float32, [0], [18])
        speed = holding.compute_speed()
        assert speed is not None
        assert all(part >= 0 for part in speed)
    finally:
        holding.close()


def test_what_arrives_wrong_is_not_taken(model, hold):
    holding = hold()
    until(lambda: holding.is_settled)
    numel = [layer.layout.numel for layer in model[0]]

    def flipped(parcel):
        data = parcel.data.copy()
        data[1234] ^= 1
        return parcel._replace(data=data)

    def read(spoil):
        out = torch.zeros(numel[1])
        HostTier(LocalHosts(holding, spoil=spoil), numel, torch.float32).read(1, 3, out)
        return out

    assert torch.equal(read(lambda parcel: parcel), model[2][1][3])
    with pytest.raises(CorruptExpert, match=r"expert 3 of MoE layer 1 arrived with checksum [0-9a-f]{8}, sent was"):
        read(flipped)
    with pytest.raises(CorruptExpert, match=rf"came with {numel[1] * 4 - 4} bytes, but has {numel[1] * 4}"):
        read(lambda parcel: parcel._replace(data=parcel.data[:-4]))


def test_an_expert_is_cast_to_the_slots_dtype(model, hold):
    holding = hold()
    until(lambda: holding.is_settled)
    out = torch.zeros(model[0][0].layout.numel, dtype=torch.bfloat16)
    HostTier(LocalHosts(holding), [out.numel()] * 2, torch.float32).read(0, 6, out)
    assert torch.equal(out, model[2][0][6].bfloat16())


def test_hosts_on_the_node_are_read_without_a_call_and_let_go(model, hold):
    hosts = LocalHosts(hold(keys=ALL[:8]), hold(keys=ALL[8:]), is_near=True)
    until(lambda: all(h.is_settled for h in hosts.holdings))
    node = NodeTier(hosts)
    out = torch.zeros(model[0][1].layout.numel)
    node.read(1, 2, out)
    assert torch.equal(out, model[2][1][2])
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
def tokens(saved_model):
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


def test_nothing_is_left_behind(model):
    before = num_left()
    for _ in range(3):
        holding = Holding(model[0], model[1], memory="50%", dtype=torch.float32)
        holding.hold(ALL)
        until(lambda: holding.is_settled)  # noqa: B023
        hosts = LocalHosts(holding, is_near=True)
        node = NodeTier(hosts)
        node.read(*ALL[0], torch.zeros(model[0][0].layout.numel))
        node.close()
        holding.close()
        holding.close()
    assert num_left() == before

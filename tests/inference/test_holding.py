"""A process that holds experts for others: what is read is whole, what is wanted comes first, and memory is kept to."""
# ruff: noqa: F811  (fixtures that are imported)

import threading
import time

import numpy as np
import pytest
import torch

from raymoe.inference.holding import Holding
from raymoe.inference.shared_slots import SharedSlots
from raymoe.inference.tiers import CheckpointTier, NotHeld
from raymoe.kernels import expert_rows, plan
from raymoe.models import expert_parameters, load_without_experts, moe_layers, weights_of
from tests.inference.local_hosts import ALL, experts, hold, until  # noqa: F401


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


def test_a_holding_reads_the_hottest_first_and_gives_what_it_has(experts, hold):
    begun, may_go_on = [], threading.Event()

    class Slow:
        def read(self, layer, expert, out):
            begun.append((layer, expert))
            if len(begun) > 2:
                assert may_go_on.wait(20)
            return experts[1].read(layer, expert, out)

    holding = hold(keys=[(1, 5), (0, 2), (1, 0)], source=Slow())
    until(lambda: len(begun) == 3)
    first, second, missing = holding.give([(0, 2), (1, 5), (1, 0)])
    assert begun == [(1, 5), (0, 2), (1, 0)]
    assert missing is None
    assert not holding.is_settled
    assert torch.equal(torch.from_numpy(first.data.copy()).view(torch.float32), experts[2][0][2])
    assert torch.equal(torch.from_numpy(second.data.copy()).view(torch.float32), experts[2][1][5])
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


def test_what_cannot_be_held_is_refused(experts, hold):
    with pytest.raises(
        ValueError, match=r"expert_hosts.memory: 1KiB is 1024 bytes, less than one expert takes; give at least"
    ):
        hold(memory="1KiB")
    with pytest.raises(ValueError, match="there is no expert 8 in MoE layer 1"):
        hold(keys=[(1, 8)])


def test_an_expert_that_cannot_be_read_leaves_the_others(experts, hold, caplog):
    class Broken:
        def read(self, layer, expert, out):
            if (layer, expert) == (0, 1):
                raise OSError("Input/output error")
            return experts[1].read(layer, expert, out)

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

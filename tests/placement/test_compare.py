"""Policies side by side: numbers worked out by hand on two ranks, and what must hold for any trace."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.placement import Base, ClusterSpec, LoadTrace, Plan, Workload, even_owners, expert_memory, policy
from raymoe.placement.compare import compare, slots_in_memory, with_baseline
from raymoe.placement.plan import owned
from raymoe.placement.policy import PolicyDefaults

# a byte and a FLOP take a nanosecond, and nothing has a latency
PAIR = ClusterSpec((0, 0), 10**9, 10**9, latency_ns=0, flops_s=10**9, memory_bytes=1000)
LAYER = Workload(expert_bytes=100, row_bytes=1, row_flops=1, attention_ns=5, state_bytes=200)
# both ranks: 30 rows for the expert of rank 0, 10 for that of rank 1
ROWS = np.tile(np.array([30, 10]), (4, 2, 1, 1))
TRACE = LoadTrace(ROWS)


class Everywhere(PolicyDefaults):
    name = "everywhere"
    source = "test"

    def prepare(self, history, state):
        return Plan.of(state.base, np.ones_like(state.base.resident), state.workload)


class Swap(PolicyDefaults):
    """The two experts change places before the third step."""

    name = "swap"
    source = "test"
    interval = 2

    def prepare(self, history, state):
        return Plan.of(state.base, state.base.resident, state.workload)

    def reshard(self, history, state):
        return Base.of_owners(1 - state.base.owners, 2)


def rows_of(*policies, trace=TRACE, cluster=PAIR, workload=LAYER, skip=1, **options):
    return compare(trace, [*policies], cluster, workload, skip=skip, **options)


def test_expert_parallelism_by_hand():
    (row,) = rows_of(policy("ep"))
    # rank 0 takes in 30 rows and computes 60 of 80; 4 exchanges, 3 forwards
    assert row["moe_ms"] == pytest.approx((4 * 30 + 3 * 60) / 1e6)
    assert row["step_ms"] == pytest.approx((300 + 3 * 5) / 1e6)
    parts = [row[part] * 1e6 for part in ("attention_ms", "compute_ms", "all_to_all_ms", "exposed_ms", "reshard_ms")]
    assert parts == pytest.approx([15, 180, 120, 0, 0])
    assert row["ideal_share"] == pytest.approx(3 * 40 / 300)
    assert row["imbalance"] == pytest.approx(1.5)
    assert (row["bytes"], row["near_bytes"], row["far_bytes"]) == (4 * 40, 4 * 40, 0)
    assert row["memory_bytes"] == 100 + 100 + 200
    assert (row["memory_share"], row["fits"]) == (0.4, True)
    assert (row["speedup_over_ep"], row["step_speedup_over_ep"], row["copies"]) == (1, 1, 0)
    assert (row["moe_p5_ms"], row["moe_p95_ms"], row["cold_ms"]) == pytest.approx((3e-4, 3e-4, 3e-4))


def test_copies_by_hand():
    ep, row = rows_of(Everywhere())
    assert ep["policy"] == "ep"
    # each rank fetches 100 bytes behind 5 ns of attention and sends 100 home behind 10
    assert row["exposed_ms"] == pytest.approx((95 + 90) / 1e6)
    assert row["moe_ms"] == pytest.approx((3 * 40 + 185) / 1e6)
    assert row["speedup_over_ep"] == pytest.approx(300 / 305)
    assert row["step_speedup_over_ep"] == pytest.approx(315 / 320)
    assert row["bytes"] == 4 * 100
    assert row["copies"] == 2
    assert row["memory_bytes"] == 400 + 100 + 2 * 100


def test_resharding_is_shared_out_over_the_counted_steps():
    row = rows_of(Swap())[1]
    # each rank fetches 100 + 200 bytes once in three steps
    assert row["reshard_ms"] == pytest.approx(300 / 3 / 1e6)
    assert row["step_ms"] == pytest.approx((300 + 15 + 100) / 1e6)


def test_means_over_steps_and_layers():
    # a layer of 300 ns and one without a transfer: 60 rows at most, each at home
    rows = np.stack([ROWS[:, :, 0], np.tile(np.diag([60, 20]), (4, 1, 1))], axis=2)
    (row,) = rows_of(policy("ep"), trace=LoadTrace(rows))
    assert row["moe_ms"] == pytest.approx(np.sqrt(300 * 180) / 1e6)
    assert row["step_ms"] == pytest.approx((300 + 180 + 2 * 15) / 1e6)
    assert row["ideal_share"] == pytest.approx(np.sqrt(120 / 300 * 120 / 180))


def test_steps_at_the_start_count_apart():
    rows = ROWS.copy()
    rows[0] = np.array([[[60, 0]], [[60, 0]]])
    (row,) = rows_of(policy("ep"), trace=LoadTrace(rows))
    assert row["moe_ms"] == pytest.approx(300 / 1e6)
    assert row["cold_ms"] == pytest.approx((4 * 60 + 3 * 120) / 1e6)
    assert rows_of(policy("ep"), skip=0)[0]["cold_ms"] is None


@pytest.mark.parametrize("skip", [-1, 4])
def test_a_step_must_be_left(skip):
    with pytest.raises(ValueError, match=rf"skip = {skip}: the trace has 4 steps, and at least one must be left"):
        rows_of(policy("ep"), skip=skip)


def test_nothing_routed_takes_no_time_and_warns_of_nothing():
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for row in rows_of(*map(policy, ("ep", "fssdp")), trace=LoadTrace(np.zeros_like(ROWS))):
            assert row["moe_ms"] == row["bytes"] == 0
            assert row["speedup_over_ep"] == row["ideal_share"] == row["imbalance"] == 1


def test_layers_without_rows_do_not_count():
    rows = np.concatenate([ROWS, np.zeros_like(ROWS)], axis=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = rows_of(policy("ep"), trace=LoadTrace(rows))
    assert row["moe_ms"] == pytest.approx(300 / 1e6)
    assert row["imbalance"] == 1.5


def test_the_baseline_comes_first_and_once():
    names = [each.name for each in with_baseline([policy("fssdp"), policy("ep")])]
    assert names == ["ep", "fssdp"]
    assert [each.name for each in with_baseline([policy("fssdp")])] == names


def test_a_trace_of_fewer_ranks_is_split():
    whole = LoadTrace(ROWS.sum(axis=1, keepdims=True))
    assert rows_of(policy("ep"), trace=whole)[0]["moe_ms"] == rows_of(policy("ep"))[0]["moe_ms"]


def test_on_step_is_called_for_every_step_of_every_policy():
    calls = []
    rows_of(policy("fssdp"), on_step=lambda: calls.append(1))
    assert len(calls) == 2 * 4


def test_bounds_are_marked():
    assert [row["is_bound"] for row in rows_of(policy("fssdp"), policy("fssdp-known"))] == [False, False, True]


def test_slots_bound_copies():
    rows = np.tile(np.array([300, 200, 100, 400]), (6, 2, 3, 1))
    assert rows_of(policy("fssdp-paper"), trace=LoadTrace(rows), extra_slots=0)[1]["copies"] == 0


@st.composite
def sizes(draw):
    cluster = replace(PAIR, node_of=tuple(range(draw(st.integers(2, 4)))), memory_bytes=draw(st.integers(500, 30_000)))
    return draw(st.integers(1, 4)), draw(st.integers(1, 9)), cluster, draw(st.booleans())


@given(sizes())
def test_slots_are_as_many_as_fit(case):
    num_layers, num_experts, cluster, rematerialise = case
    workload = replace(LAYER, rematerialise=rematerialise, gradient_bytes=50)
    num_devices = cluster.num_devices
    base = Base.of_owners(even_owners(num_layers, num_experts, num_devices), num_devices)
    slots = slots_in_memory(num_layers, num_experts, workload, cluster)
    budget = cluster.memory_bytes * 8 // 10

    def taken(count: int) -> int:
        """Of the fullest device with ``count`` copies in each layer."""
        fullest = int(expert_memory(Plan.of(base, base.resident, workload), workload).argmax())
        copies = owned(base.owners, num_devices)
        for layer in range(num_layers):
            absent = np.flatnonzero(copies[layer, :, fullest] == 0)
            if len(absent) < count:
                return 0
            copies[layer, absent[:count], fullest] = 1
        return int(expert_memory(Plan.of(base, copies, workload), workload)[fullest])

    assert 0 <= slots <= num_experts
    assert slots == 0 or taken(slots) <= budget
    if slots < num_experts and num_experts >= num_devices:
        assert taken(slots + 1) > budget or taken(slots + 1) == 0


class Replicas(Everywhere):
    """Each expert lives on as many ranks as there are slots for."""

    name = "replicas"

    def start(self, base, state):
        return Base(base.owners, np.ones_like(base.resident)) if state.extra_slots else base


@pytest.mark.parametrize(("memory_bytes", "slots"), [(999, 0), (1000, 1), (1500, 2)])
def test_slots_of_replicas_have_room_for_their_state(memory_bytes, slots):
    # 400 bytes an expert with its state, and one is at home
    row = rows_of(Replicas(), cluster=replace(PAIR, memory_bytes=memory_bytes))[1]
    assert row["extra_slots"] == slots
    assert row["fits"]


def test_slots_without_a_known_memory_are_all_experts():
    assert slots_in_memory(3, 7, LAYER, replace(PAIR, memory_bytes=None)) == 7


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 5), st.sampled_from([(0, 0), (0, 1), (0, 0, 1)]))
def test_what_holds_for_any_trace(seed, num_layers, num_experts, nodes):
    rng = np.random.default_rng(seed)
    loads = rng.choice([0, 0, 1, 7, 200], size=(5, len(nodes), num_layers, num_experts))
    rows = rows_of(
        *map(policy, ("fssdp", "fssdp-rm", "fssdp-known")), trace=LoadTrace(loads), cluster=replace(PAIR, node_of=nodes)
    )
    for row in rows:
        parts = ("attention_ms", "compute_ms", "all_to_all_ms", "exposed_ms", "reshard_ms")
        assert row["step_ms"] == pytest.approx(sum(row[part] for part in parts))
        assert row["moe_p5_ms"] <= row["moe_p95_ms"]
        assert 0 < row["ideal_share"] <= 1 + 1e-12
        assert row["imbalance"] >= 1 - 1e-12
        assert abs(row["bytes"] - row["near_bytes"] - row["far_bytes"]) <= 1
        assert 0 <= row["forecast_error"] <= 1
        assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))

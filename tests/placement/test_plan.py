import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from raymoe.placement import Base, ClusterSpec, LayerPlan, PlacementState, Plan, Workload, even_owners, policy

WORKLOAD = Workload(expert_bytes=10, row_bytes=1, row_flops=1, gradient_bytes=20)
OWNERS = np.array([[0, 0, 1], [1, 0, 1]])
COPIES = np.array([[[1, 1], [1, 0], [0, 1]], [[0, 1], [1, 0], [1, 1]]], dtype=np.uint8)


def skewed_plan() -> Plan:
    rng = np.random.default_rng(5)
    history = rng.zipf(1.5, size=(5, 6, 16)).clip(max=10_000)
    cluster = ClusterSpec.even(2, 4, intra_bytes_s=100, inter_bytes_s=10)
    workload = Workload(expert_bytes=1000, row_bytes=100, row_flops=10**6, attention_ns=50_000, choices=2)
    state = PlacementState(Base.of_owners(even_owners(6, 16, 8), 8), cluster, workload, extra_slots=2)
    return policy("fssdp").prepare(history, state)


def plan_of(copies: np.ndarray) -> Plan:
    return Plan.of(Base.of_owners(OWNERS, 2), copies, WORKLOAD)


def test_counts_each_extra_copy_once_in_each_direction():
    assert plan_of(COPIES).bytes == {"sparse_all_gather": 20, "sparse_reduce_scatter": 40}


def test_rematerialised_copies_are_gathered_twice():
    plan = Plan.of(Base.of_owners(OWNERS, 2), COPIES, WORKLOAD.with_schedule(rematerialise=True))
    assert plan.bytes == {"sparse_all_gather": 40, "sparse_reduce_scatter": 40}


def test_resident_replicas_move_gradients_only():
    # two replicas beside the owners: each takes part in a sum there and back
    plan = Plan.of(Base(OWNERS, COPIES), COPIES, WORKLOAD)
    assert plan.bytes == {"sparse_all_gather": 0, "sparse_reduce_scatter": 2 * 2 * 20}
    assert plan.layer(0).extra_copies().sum() == 0


def test_slices_move_all_but_the_own_part():
    # 8 copies of 10 bytes, of which the half is there already
    plan = Plan.of(Base.of_owners(OWNERS, 2), COPIES, WORKLOAD, layout="sliced")
    assert plan.bytes["sparse_all_gather"] == 8 * 10 // 2


def test_layer_gives_that_layer():
    layer = plan_of(COPIES).layer(1)
    assert layer.owners.tolist() == [1, 0, 1]
    assert layer.extra_copies().tolist() == [[0, 0], [0, 0], [1, 0]]
    assert (layer.num_experts, layer.num_devices) == (3, 2)


def test_nobody_can_change_a_plan():
    copies = COPIES.copy()
    plan = plan_of(copies)
    copies[0, 0, 1] = 0
    assert plan.copies[0, 0, 1] == 1
    with pytest.raises(ValueError, match="read-only"):
        plan.layer(0).copies[0, 1] = 0


def test_digest_fits_an_int64():
    assert 0 <= skewed_plan().digest() < 2**63


@pytest.mark.parametrize("change", ["owners", "copies", "resident", "layout", "dispatch", "timing", "bytes"])
def test_digest_sees_every_part(change):
    parts = {"owners": OWNERS.copy(), "copies": np.ones_like(COPIES), "dispatch": "local", "timing": "hidden"}
    parts |= {"layout": "whole", "resident": None}
    parts["bytes"] = {"sparse_all_gather": 1}
    changed = {
        "owners": 1 - OWNERS,
        "copies": COPIES,
        "resident": np.ones_like(COPIES),
        "layout": "sliced",
        "dispatch": "even",
        "timing": "blocking",
        "bytes": {"sparse_all_gather": 2},
    }
    assert Plan(**parts).digest() != Plan(**(parts | {change: changed[change]})).digest()


def test_digest_is_the_same_in_another_process():
    code = "from tests.placement.test_plan import skewed_plan; print(skewed_plan().digest())"
    # another hash seed, as ranks on other machines have
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True, timeout=120)
    assert int(out.stdout) == skewed_plan().digest()


def test_survives_pickling():
    plan = skewed_plan()
    assert pickle.loads(pickle.dumps(plan)).digest() == plan.digest()


def test_owners_must_hold_their_experts():
    copies = COPIES.copy()
    copies[1, 2, 1] = 0
    with pytest.raises(ValueError, match=r"copies\[1, 2\] leaves out rank 1"):
        plan_of(copies)


@pytest.mark.parametrize(
    ("owners", "copies", "said"),
    [
        (OWNERS, COPIES.astype(np.int64), "uint8"),
        (OWNERS, COPIES[:1], "to go with owners"),
        (OWNERS, COPIES * 2, "copies holds 2"),
        (OWNERS + 1, COPIES, "the ranks are 0..1"),
        (OWNERS[0], COPIES[0], "one layer is a LayerPlan"),
    ],
)
def test_broken_plans_are_refused(owners, copies, said):
    with pytest.raises(ValueError, match=said):
        Plan(owners, copies, {})


def test_a_layer_plan_is_one_layer():
    with pytest.raises(ValueError, match="all layers together are a Plan"):
        LayerPlan(OWNERS, COPIES)


def test_unknown_words_list_the_known_ones():
    with pytest.raises(ValueError, match="choose one of local, node, even, capacity"):
        Plan(OWNERS, COPIES, {}, dispatch="nearest")


@pytest.mark.parametrize("field", ["overlap_degree", "extra_slots", "window"])
def test_state_checks_its_numbers(field):
    good = {"overlap_degree": 0, "extra_slots": 0, "window": 1}
    base = Base.of_owners(OWNERS, 2)
    with pytest.raises(ValueError, match=f"{field} = -1"):
        PlacementState(base, ClusterSpec.even(1, 2, intra_bytes_s=1), WORKLOAD, **(good | {field: -1}))


def test_state_checks_owners_against_the_cluster():
    with pytest.raises(ValueError, match="must be re-sharded first"):
        PlacementState(Base.of_owners(OWNERS, 2), ClusterSpec.even(1, 1, intra_bytes_s=1), WORKLOAD, extra_slots=0)


def test_a_base_counts_what_moves():
    before, after = Base.of_owners(OWNERS, 2), Base.of_owners(1 - OWNERS, 2)
    assert (after.moved_from(before), before.moved_from(before)) == (6, 0)


@pytest.mark.parametrize("field", ["expert_bytes", "row_bytes", "row_flops", "choices"])
def test_a_workload_checks_its_numbers(field):
    good = {"expert_bytes": 1, "row_bytes": 1, "row_flops": 1, "choices": 1}
    with pytest.raises(ValueError, match=f"{field} = 0"):
        Workload(**(good | {field: 0}))


def test_an_unknown_fan_out_lists_the_known_ones():
    with pytest.raises(ValueError, match="choose one of p2p, hierarchical, chain"):
        Workload(1, 1, 1, fan_out="tree")


def test_a_gpt_layer_by_hand():
    # 2 matrices of 4 x 8 in 2 bytes; attention 10 tokens x (8 * 16 + 4 * 3 * 4) FLOPs at 1 FLOP/ns
    layer = Workload.of_transformer(
        hidden_size=4, expert_width=8, tokens=10, sequence_length=3, flops_s=10**9, choices=2, matrices=2
    )
    assert (layer.expert_bytes, layer.row_bytes, layer.row_flops, layer.state_bytes) == (128, 8, 128, 768)
    assert layer.attention_ns == 10 * (128 + 48)

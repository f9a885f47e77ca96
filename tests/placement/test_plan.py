import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from raymoe.placement import ClusterSpec, LayerPlan, PlacementState, Plan, even_owners, policy

OWNERS = np.array([[0, 0, 1], [1, 0, 1]])
COPIES = np.array([[[1, 1], [1, 0], [0, 1]], [[0, 1], [1, 0], [1, 1]]], dtype=np.uint8)


def skewed_plan() -> Plan:
    rng = np.random.default_rng(5)
    history = rng.zipf(1.5, size=(5, 6, 16)).clip(max=10_000)
    cluster = ClusterSpec.even(2, 4, intra_bytes_s=100, inter_bytes_s=10)
    return policy("fssdp").prepare(history, PlacementState(even_owners(6, 16, 8), cluster, 1000, 6, 2))


def test_counts_each_extra_copy_once_in_each_direction():
    plan = Plan.whole(OWNERS, COPIES, expert_bytes=10)
    assert plan.bytes == {"sparse_all_gather": 20, "sparse_reduce_scatter": 20}


def test_layer_gives_that_layer():
    layer = Plan.whole(OWNERS, COPIES, 10).layer(1)
    assert layer.owners.tolist() == [1, 0, 1]
    assert layer.extra_copies().tolist() == [[0, 0], [0, 0], [1, 0]]
    assert (layer.num_experts, layer.num_devices) == (3, 2)


def test_nobody_can_change_a_plan():
    copies = COPIES.copy()
    plan = Plan.whole(OWNERS, copies, 10)
    copies[0, 0, 1] = 0
    assert plan.copies[0, 0, 1] == 1
    with pytest.raises(ValueError, match="read-only"):
        plan.layer(0).copies[0, 1] = 0


def test_digest_fits_an_int64():
    assert 0 <= skewed_plan().digest() < 2**63


@pytest.mark.parametrize("change", ["owners", "copies", "dispatch", "timing", "bytes"])
def test_digest_sees_every_part(change):
    parts = {"owners": OWNERS.copy(), "copies": np.ones_like(COPIES), "dispatch": "local", "timing": "hidden"}
    parts["bytes"] = {"sparse_all_gather": 1}
    changed = {
        "owners": 1 - OWNERS,
        "copies": COPIES,
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
        Plan.whole(OWNERS, copies, 10)


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
    with pytest.raises(ValueError, match="choose one of local, even, capacity"):
        Plan(OWNERS, COPIES, {}, dispatch="nearest")


@pytest.mark.parametrize("field", ["expert_bytes", "overlap_degree", "extra_slots", "window"])
def test_state_checks_its_numbers(field):
    good = {"expert_bytes": 1, "overlap_degree": 0, "extra_slots": 0, "window": 1}
    with pytest.raises(ValueError, match=f"{field} = -1"):
        PlacementState(OWNERS, ClusterSpec.even(1, 2, intra_bytes_s=1), **(good | {field: -1}))


def test_state_checks_owners_against_the_cluster():
    with pytest.raises(ValueError, match="must be re-sharded first"):
        PlacementState(OWNERS, ClusterSpec.even(1, 1, intra_bytes_s=1), 1, 0, 0)

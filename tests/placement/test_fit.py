"""What training takes of memory, against sums by hand and against the planner's own account."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement import Base, ClusterSpec, Plan, even_owners, expert_memory
from raymoe.placement.fit import activation_bytes, fit_training, training_step_ns, training_workload
from raymoe.placement.plan import owned

GB = 10**9


@dataclass(frozen=True)
class Numbers:
    """A model of 4 blocks of which all have 8 experts of 3 x 100 x 20."""

    parameter_bytes: int = 2
    dense_parameters: int = 4 * 50_000 + 2 * 30_000
    lookup_parameters: int = 30_000
    expert_parameters: int = 4 * 8 * 6_000
    active_parameters: int = 4 * 50_000 + 2 * 30_000 + 4 * 2 * 6_000
    blocks: int = 4
    layers: int = 4
    experts: int = 8
    choices: int = 2
    expert_bytes: int = 12_000
    hidden_size: int = 100
    vocab_size: int = 300
    attention_width: int = 128
    kv_bytes: int = 1_000


def cluster(devices: int, memory_bytes: int | None, **changes) -> ClusterSpec:
    return ClusterSpec.even(1, devices, intra_bytes_s=10**9, memory_bytes=memory_bytes, flops_s=10**12, **changes)


def test_memory_of_a_device_by_hand():
    fit = fit_training(Numbers(), cluster(3, 100_000_000), tokens=10)
    assert fit.usable_bytes == 90_000_000
    assert fit.dense_bytes == 260_000 * 16
    # 32 experts over 3 devices: 11 on the fullest
    assert fit.owned_bytes == 11 * 6_000 * 16
    # a block keeps 4 H + 500 for its 50 000 parameters, and 2 x (2 H + 60) for its rows
    assert fit.activation_bytes == 10 * (4 * (900 + 520) * 2 + 300 * 10)
    assert fit.fits
    assert not fit.recompute
    assert fit.needed_bytes == fit.dense_bytes + fit.owned_bytes + fit.activation_bytes


def test_recomputation_keeps_block_inputs_and_one_block():
    assert activation_bytes(Numbers(), 7, 2, recompute=True) == 7 * ((4 * 100 + 900 + 520) * 2 + 300 * 10)


def test_activations_are_recomputed_only_where_they_do_not_fit():
    model, tokens = Numbers(), 1_000
    plain = fit_training(model, cluster(4, GB), tokens=tokens)
    assert not plain.recompute
    tight = int(plain.needed_bytes / 0.9) - 1_000
    again = fit_training(model, cluster(4, tight), tokens=tokens)
    assert again.recompute
    assert again.fits
    assert again.activation_bytes < plain.activation_bytes


def test_no_number_of_devices_holds_a_dense_part_that_one_cannot():
    fit = fit_training(Numbers(), cluster(4, 4_000_000), tokens=1)
    assert (fit.fits, fit.devices_needed, fit.extra_slots) == (False, None, 0)


@given(st.integers(4_700_000, 9_000_000), st.integers(1, 40), st.integers(1, 40))
def test_the_smallest_number_of_devices_fits_and_one_less_does_not(memory_bytes, devices, tokens):
    fit = fit_training(Numbers(), cluster(devices, memory_bytes), tokens=tokens)
    needed = fit.devices_needed
    assert fit.fits == (needed is not None and needed <= devices)
    if needed is not None:
        at = fit_training(Numbers(), cluster(needed, memory_bytes), tokens=tokens)
        assert at.fits
        if needed > 1 and fit.recompute:
            assert not fit_training(Numbers(), cluster(needed - 1, memory_bytes), tokens=tokens).fits


@given(st.integers(5_000_000, 8_000_000), st.booleans())
def test_room_for_copies_agrees_with_the_planner(memory_bytes, rematerialise):
    """As many copies as are said to fit do fit, and one more does not."""
    model, devices = Numbers(), 2
    spec = cluster(devices, memory_bytes)
    fit = fit_training(model, spec, tokens=1)
    workload = training_workload(model, spec, tokens=1, sequence_length=1, recompute=False)
    workload = workload.with_schedule(rematerialise=rematerialise)
    assert workload.expert_bytes + workload.gradient_bytes + workload.state_bytes == 6_000 * 16
    base = Base.of_owners(even_owners(4, 8, devices), devices)

    def needed(slots: int) -> int:
        copies = owned(base.owners, devices)
        # each device owns half of a layer: it takes the other half's first experts
        for device in range(devices):
            others = np.flatnonzero(base.owners[0] != device)[:slots]
            copies[:, others, device] = 1
        memory_D = expert_memory(Plan.of(base, copies, workload), workload)
        return fit.dense_bytes + fit.activation_bytes + int(memory_D.max())

    slots = min(fit.extra_slots_rematerialised if rematerialise else fit.extra_slots, 4)
    if fit.fits:
        assert needed(slots) <= fit.usable_bytes
        assert slots == 4 or needed(slots + 1) > fit.usable_bytes
        assert fit.rematerialise == (fit.extra_slots == 0 and fit.extra_slots_rematerialised > 0)


def test_a_step_by_hand():
    model, spec = Numbers(), cluster(4, GB)
    workload = training_workload(model, spec, tokens=10, sequence_length=50, recompute=True)
    block = 10 * 2 * (50_000 + 50 * 128)
    assert workload.attention_ns == block // 1000
    assert (workload.row_bytes, workload.row_flops, workload.choices) == (200, 12_000, 2)
    step_ns = training_step_ns(model, spec, workload, moe_ns=5_000.0, tokens=10, sequence_length=50)
    # four passes at 1 FLOP a picosecond, and a ring over 4 devices at 1 byte a nanosecond
    flops = 4 * block + 10 * 2 * 300 * 100
    assert step_ns == pytest.approx(4 * 5_000 + 4 * flops / 1000 + 2 * 3 / 4 * 260_000 * 2)


def test_between_nodes_the_ring_is_as_slow_as_their_link():
    model = Numbers()
    spec = ClusterSpec.even(2, 4, intra_bytes_s=10**12, inter_bytes_s=10**9, flops_s=10**12)
    workload = training_workload(model, spec, tokens=1, sequence_length=1, recompute=False)
    alone = replace(spec, node_of=(0,), inter_bytes_s=10**12)
    both, one = (
        training_step_ns(model, each, workload, moe_ns=0.0, tokens=1, sequence_length=1) for each in (spec, alone)
    )
    assert both - one == pytest.approx(2 * 1 / 2 * 260_000 * 2)


def test_what_is_asked_for_is_checked():
    with pytest.raises(ValueError, match="how much memory a device has"):
        fit_training(Numbers(), cluster(2, None), tokens=1)
    with pytest.raises(ValueError, match="tokens = 0"):
        fit_training(Numbers(), cluster(2, GB), tokens=0)

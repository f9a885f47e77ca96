"""What serving takes of a device, and the bounds on its rate, by hand."""

from dataclasses import replace
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement.serving import ServingMachine, distinct_experts, fit_serving
from tests.placement.test_fit import Numbers

ALL = 32 * 12_000
DENSE = 260_000 * 2
MACHINE = ServingMachine(
    memory_bytes=2_000_000,
    memory_bytes_s=10**9,
    flops_s=10**12,
    host_bytes_s=10**8,
    file_bytes_s=10**7,
    link_bytes_s=5 * 10**7,
    link_latency_ns=1_000,
)


def small(experts: int, **changes) -> ServingMachine:
    """A device with room for so many experts beside dense part and one request of one token."""
    usable = DENSE + 1_000 + experts * 12_000
    return replace(MACHINE, memory_bytes=-(-usable * 10 // 9), **changes)


def test_a_model_that_fits_is_bound_by_what_it_reads():
    fit = fit_serving(Numbers(), MACHINE, context=10, batches=[1])
    assert (fit.fits, fit.is_whole, fit.share) == (True, True, 1.0)
    assert (fit.dense_bytes, fit.kv_bytes, fit.expert_bytes, fit.budget_bytes) == (DENSE, 10_000, ALL, ALL)
    assert (fit.host_bytes, fit.file_bytes, fit.devices_whole, fit.spread) == (0, 0, 1, ())
    (step,) = fit.uniform
    read = DENSE - 30_000 * 2 + 4 * 2 * 12_000 + 10_000
    assert step.step_ns == pytest.approx(read)
    assert (step.misses, step.bound) == (0, "memory bandwidth")
    assert step.tokens_per_s == pytest.approx(1e9 / read)
    assert fit.requests_whole == (1_800_000 - DENSE - ALL) // 10_000
    assert fit.requests_most == (1_800_000 - DENSE - 12_000) // 10_000


def test_a_large_batch_is_bound_by_computation():
    fit = fit_serving(Numbers(), replace(MACHINE, memory_bytes=10**9), context=1, batches=[100_000])
    (step,) = fit.uniform
    assert step.bound == "memory bandwidth"
    fit = fit_serving(Numbers(), replace(MACHINE, memory_bytes=10**9, flops_s=10**9), context=1, batches=[100_000])
    (step,) = fit.uniform
    assert step.bound == "computation"
    assert step.step_ns == pytest.approx(2 * 100_000 * (Numbers().active_parameters - 30_000))


def test_half_of_the_experts_on_the_device():
    fit = fit_serving(Numbers(), small(16), context=1, batches=[1])
    assert (fit.is_whole, fit.share, fit.devices_whole) == (False, 0.5, 2)
    assert (fit.budget_bytes, fit.host_bytes, fit.file_bytes) == (ALL // 2, ALL // 2, 0)
    (uniform,), (worst,) = fit.uniform, fit.worst
    # 8 experts a token, half of them missing, at a tenth of a byte a nanosecond
    assert uniform.misses == 4
    assert uniform.fetch_ns == pytest.approx(4 * 12_000 * 10)
    assert worst.misses == 8
    assert worst.step_ns == pytest.approx(8 * 12_000 * 10)
    assert worst.bound == "fetching experts from host memory"


def test_what_host_memory_does_not_hold_is_read_from_files():
    fit = fit_serving(Numbers(), small(16, host_bytes=ALL // 4 * 10 // 9 + 1), context=1, batches=[1])
    assert (fit.host_bytes, fit.file_bytes) == (ALL // 4, ALL // 4)
    (step,) = fit.worst
    # half of the missing ones come from files, ten times slower
    assert step.step_ns == pytest.approx(8 / 2 * 12_000 * 100)
    assert step.bound == "reading experts from files"


def test_a_cpu_has_no_host_tier():
    fit = fit_serving(Numbers(), small(16, has_host=False), context=1, batches=[1])
    assert (fit.host_bytes, fit.file_bytes) == (0, ALL // 2)
    assert fit.uniform[0].step_ns == pytest.approx(4 * 12_000 * 100)


def test_experts_spread_over_devices_move_whatever_is_cheaper():
    fit = fit_serving(Numbers(), small(16, devices=2), context=1, batches=[1])
    (step,) = fit.spread
    assert fit.move_expert_ns == 1_000 + 12_000 * 20
    assert fit.move_token_ns == 2 * (1_000 + 200 * 20)
    # half of two rows of 200 bytes, there and back in each of 4 layers; each device reads half of the experts
    near = DENSE - 60_000 + 1_000 + 4 * 12_000
    assert step.step_ns == pytest.approx(near + 4 * 2 * (1_000 + 200 * 20))
    assert step.bound == "links: tokens move"
    slow = small(16, devices=2, link_latency_ns=10**9)
    (step,) = fit_serving(Numbers(), slow, context=1, batches=[1]).spread
    assert step.bound == "links: experts move"
    assert step.step_ns == pytest.approx(4 * 12_000 * 20)
    assert fit_serving(Numbers(), small(15, devices=2), context=1, batches=[1]).spread == ()


def test_unknown_bandwidths_leave_the_rate_unknown():
    fit = fit_serving(Numbers(), ServingMachine(memory_bytes=2_000_000), context=1, batches=[1])
    assert fit.is_whole
    assert (fit.uniform[0].tokens_per_s, fit.uniform[0].bound) == (None, "memory bandwidth")
    fit = fit_serving(Numbers(), small(16, host_bytes_s=None), context=1, batches=[1])
    assert (fit.uniform[0].tokens_per_s, fit.uniform[0].bound) == (None, "fetching experts from host memory")


def test_no_room_for_one_expert():
    fit = fit_serving(Numbers(), small(0), context=1, batches=[1])
    assert (fit.fits, fit.uniform, fit.devices_whole, fit.requests_most) == (False, (), None, 0)


def test_budgets_that_cannot_be_kept():
    for budget in (11_999, 17 * 12_000):
        with pytest.raises(ValueError, match="expert_memory is"):
            fit_serving(Numbers(), small(16), context=1, batches=[1], budget_bytes=budget)
    assert fit_serving(Numbers(), small(16), context=1, batches=[1], budget_bytes=30_000).budget_bytes == 24_000
    with pytest.raises(ValueError, match="context = 0"):
        fit_serving(Numbers(), MACHINE, context=0, batches=[1])


@given(st.integers(5, 9), st.integers(1, 3), st.integers(1, 64))
def test_places_add_up_and_uniform_is_never_slower(tenths, devices, batch):
    machine = replace(MACHINE, memory_bytes=tenths * 150_000, host_bytes=200_000, devices=devices)
    fit = fit_serving(Numbers(), machine, context=3, batches=[batch])
    assert fit.budget_bytes + fit.host_bytes + fit.file_bytes == ALL
    if fit.fits:
        assert fit.dense_bytes + fit.kv_bytes + fit.budget_bytes <= fit.usable_bytes
        assert (fit.uniform[0].tokens_per_s or 0) >= (fit.worst[0].tokens_per_s or 1)
    assert fit.fits == (batch <= fit.requests_most)
    assert fit.is_whole == (batch <= fit.requests_whole)


@pytest.mark.parametrize(("experts", "choices", "batch"), [(4, 2, 1), (4, 2, 2), (5, 1, 3), (4, 3, 2)])
def test_distinct_experts_by_counting(experts, choices, batch):
    one = list(combinations(range(experts), choices))
    unions = [len(set().union(*drawn)) for drawn in product(one, repeat=batch)]
    assert distinct_experts(experts, choices, batch) == pytest.approx(sum(unions) / len(unions))

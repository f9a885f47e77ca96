"""What is said of a trace, against figures worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.placement.sharding import even_owners
from raymoe.placement.statistics import trace_statistics
from raymoe.placement.trace import LoadTrace


def test_statistics_by_hand():
    # two steps, two ranks, one layer, four experts
    rows = np.array([[[[6, 2, 0, 0]], [[6, 0, 2, 0]]], [[[2, 2, 2, 2]], [[2, 2, 2, 2]]]])
    found = trace_statistics(LoadTrace(rows), 2)
    # step 0: loads 12, 2, 2, 0 of 16, devices 14 and 2; step 1: all alike
    assert found["expert_max_mean"] == pytest.approx((3.0 + 1.0) / 2)
    assert found["top1_share"] == pytest.approx((0.75 + 0.25) / 2)
    assert found["top2_share"] == pytest.approx((0.875 + 0.5) / 2)
    assert found["top4_share"] == found["top8_share"] == 1.0
    assert found["device_max_mean"] == pytest.approx((14 / 8 + 1) / 2)
    # the mean absolute difference of all pairs, over twice the mean
    pairs = [abs(a - b) for a in (12, 2, 2, 0) for b in (12, 2, 2, 0)]
    assert found["gini"] == pytest.approx(np.mean(pairs) / (2 * 4) / 2)
    assert found["zero_share"] == 4 / 16
    assert found["drift"] == pytest.approx((0.5 + 0.125 + 0.125 + 0.25) / 2)
    # step 0: each rank is 1/8 off on two experts; step 1: none is
    assert found["rank_distance"] == pytest.approx((0.125 + 0) / 2)


def test_statistics_pass_over_what_routed_nothing():
    rows = np.zeros((2, 2, 2, 4), dtype=np.int64)
    rows[0, 0, 0] = [4, 0, 0, 0]
    found = trace_statistics(LoadTrace(rows))
    assert (found["expert_max_mean"], found["gini"], found["rank_distance"]) == (4.0, 0.75, 0.0)
    assert np.isnan(found["drift"])
    assert np.isnan(trace_statistics(LoadTrace(rows[::-1]))["drift"])
    assert np.isnan(trace_statistics(LoadTrace(np.zeros_like(rows)))["gini"])


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_device_max_mean_is_that_of_the_even_split(num_devices, num_experts, seed):
    rows = np.random.default_rng(seed).integers(0, 50, size=(2, 2, 1, num_experts)) + 1
    loads = np.zeros((2, num_devices))
    for expert, owner in enumerate(even_owners(1, num_experts, num_devices)[0]):
        loads[:, owner] += rows[:, :, 0, expert].sum(axis=1)
    expected = (loads.max(axis=1) / loads.mean(axis=1)).mean()
    assert trace_statistics(LoadTrace(rows), num_devices)["device_max_mean"] == pytest.approx(expected)

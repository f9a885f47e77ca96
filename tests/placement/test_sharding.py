import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement import check_owners, even_owners

sizes = st.integers(1, 40)


@given(st.integers(1, 4), sizes, sizes)
def test_runs_are_contiguous_and_as_equal_as_can_be(num_layers, num_experts, num_devices):
    owners = even_owners(num_layers, num_experts, num_devices)
    assert owners.shape == (num_layers, num_experts)
    assert (np.diff(owners, axis=1) >= 0).all()
    owned = np.bincount(owners[0], minlength=num_devices)
    assert owned.max() - owned.min() <= 1


@given(sizes, sizes)
def test_follows_the_formula(num_experts, num_devices):
    expected = [e * num_devices // num_experts for e in range(num_experts)]
    assert even_owners(1, num_experts, num_devices)[0].tolist() == expected


def test_no_experts_are_refused():
    with pytest.raises(ValueError, match="num_experts = 0"):
        even_owners(1, 0, 2)


def test_uneven_owners_pass():
    owners = np.array([[2, 2, 2, 0], [1, 1, 1, 1]], dtype=np.int32)
    assert check_owners(owners, 3).dtype == np.int64


def test_a_rank_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"owners\[1, 2\] = 3, but the ranks are 0..2"):
        check_owners(np.array([[0, 1, 2], [0, 1, 3]]), 3)


@pytest.mark.parametrize(
    "owners", [np.zeros((1, 2, 3), dtype=int), np.zeros(3), np.zeros((0, 3), dtype=int), np.int64(0)]
)
def test_wrong_arrays_are_refused(owners):
    with pytest.raises(ValueError, match="owners must be integers"):
        check_owners(owners, 2)

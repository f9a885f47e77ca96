import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement import LOAD_SCALE, forecast_error, predict


def history(*samples) -> np.ndarray:
    return np.array(samples, dtype=np.int64).reshape(len(samples), 1, -1)


def test_averages_the_last_five():
    past = history([999, 999], [1, 0], [2, 0], [3, 0], [4, 0], [5, 10])
    assert predict(past).tolist() == [[3 * LOAD_SCALE, 2 * LOAD_SCALE]]


def test_fewer_samples_are_averaged_as_they_are():
    assert predict(history([1, 4], [2, 4])).tolist() == [[LOAD_SCALE * 3 // 2, LOAD_SCALE * 4]]


def test_no_samples_forecast_nothing():
    assert predict(np.zeros((0, 2, 3), dtype=np.int64)).tolist() == [[0, 0, 0], [0, 0, 0]]


@given(st.lists(st.lists(st.integers(0, 10**9), min_size=3, max_size=3), min_size=1, max_size=6), st.integers(1, 6))
def test_the_mean_is_exact_up_to_six_samples(samples, window):
    recent = samples[-window:]
    forecast = predict(history(*samples), window)[0]
    assert [int(f) * len(recent) for f in forecast] == [sum(s[e] for s in recent) * LOAD_SCALE for e in range(3)]


def test_narrow_counters_do_not_overflow():
    past = np.full((5, 1, 1), 65535, dtype=np.uint16)
    assert predict(past)[0, 0] == 65535 * LOAD_SCALE


@pytest.mark.parametrize(
    ("past", "window", "said"),
    [
        (np.zeros((2, 3), dtype=int), 5, "W, L, E"),
        (np.zeros((1, 2, 3)), 5, "float64"),
        (np.full((1, 1, 1), -1), 5, "negative load"),
        (np.zeros((1, 1, 1), dtype=int), 0, "window = 0"),
    ],
)
def test_refuses_what_is_not_a_history(past, window, said):
    with pytest.raises(ValueError, match=said):
        predict(past, window)


def test_last_and_exponential_by_hand():
    past = history([7, 0], [1, 0], [4, 3])
    assert predict(past, forecast="last").tolist() == [[4 * LOAD_SCALE, 3 * LOAD_SCALE]]
    # weights 1, 2, 4
    expected = [(7 + 2 * 1 + 4 * 4) * LOAD_SCALE // 7, 4 * 3 * LOAD_SCALE // 7]
    assert predict(past, forecast="exponential").tolist() == [expected]


def test_an_unknown_forecast_lists_the_known_ones():
    with pytest.raises(ValueError, match="choose one of mean, last, exponential"):
        predict(history([1]), forecast="median")


def test_error_is_the_share_that_was_misplaced():
    forecast, loads = np.array([[6, 4], [1, 1], [0, 0]]), np.array([[10, 0], [30, 30], [0, 0]])
    assert forecast_error(forecast, loads).tolist() == pytest.approx([0.4, 0, 0])

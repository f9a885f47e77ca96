"""Quality against sets counted by hand, combine, and the judge's states."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymoe.inference.predictors import Judge, Quality, WindowCost, combine

SETS = st.sets(st.integers(0, 5))


def mask(experts: set[int]) -> torch.Tensor:
    return torch.tensor([expert in experts for expert in range(6)])


@given(st.lists(st.tuples(st.integers(0, 1), st.none() | SETS, SETS), max_size=20), st.integers(1, 8))
def test_counts_are_those_of_the_sets(visits, window):
    sizes = [7, 11]
    quality = Quality(sizes, window_visits=window)
    for layer, named, truth in visits:
        if named is not None:
            quality.predicted({layer: torch.full((6,), 0.9)})
            # the later word counts
            quality.predicted({layer: torch.where(mask(named), 0.5, 0.49)})
        quality.settled(layer, mask(truth))
    for counts, seen in ((quality.total, visits), (quality.window, visits[-window:])):
        pairs = [(layer, named or set(), truth) for layer, named, truth in seen]
        assert counts.visits == len(pairs)
        assert counts.predicted == sum(len(named) for _, named, _ in pairs)
        assert counts.wanted == sum(len(truth) for *_, truth in pairs)
        assert counts.hits == sum(len(named & truth) for _, named, truth in pairs)
        assert counts.wanted_bytes == sum(sizes[layer] * len(truth) for layer, _, truth in pairs)
        assert counts.hit_bytes == sum(sizes[layer] * len(named & truth) for layer, named, truth in pairs)
        assert counts.wasted_bytes == sum(sizes[layer] * len(named - truth) for layer, named, truth in pairs)


def test_a_prediction_counts_for_one_visit():
    quality = Quality([1, 1])
    quality.predicted({0: torch.ones(6)})
    quality.settled(0, mask({1, 2, 3}))
    quality.settled(0, mask({1, 2, 3}))
    assert (quality.total.precision, quality.total.recall, quality.total.byte_recall) == (0.5, 0.5, 0.5)
    assert quality.weight == pytest.approx(7 / 14)
    assert Quality([1]).weight == 0.5


@pytest.mark.parametrize("threshold", [0.0, 1.1, math.nan])
def test_quality_refuses_a_bad_threshold(threshold):
    with pytest.raises(ValueError, match=r"threshold = .*: must be above 0 and at most 1"):
        Quality([1], threshold=threshold)
    with pytest.raises(ValueError, match="window_visits = 0"):
        Quality([1], window_visits=0)


def test_combine_takes_the_weighted_mean_of_log_odds():
    a, b = {0: torch.tensor([0.9, 0.2]), 1: torch.tensor([0.3, 0.4])}, {0: torch.tensor([0.6, 0.1])}
    merged = combine([a, b], [3.0, 1.0])
    assert merged.keys() == {0, 1}
    # who did not speak of a layer does not count there
    assert merged[1].tolist() == pytest.approx([0.3, 0.4])
    for i, (p, q) in enumerate(((0.9, 0.6), (0.2, 0.1))):
        odds = (3 * math.log(p / (1 - p)) + math.log(q / (1 - q))) / 4
        assert merged[0][i].item() == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-6)
    assert combine([a, b], [0.0, 1.0]).keys() == {0}
    assert combine([], []) == {}


def test_combine_of_certainties_is_a_probability():
    merged = combine([{0: torch.tensor([1.0, 0.0, 1.0])}, {0: torch.tensor([0.0, 0.0, 1.0])}], [1.0, 1.0])
    assert merged[0].tolist() == pytest.approx([0.5, 0.0, 1.0], abs=1e-3)


def test_combine_names_what_is_wrong():
    with pytest.raises(ValueError, match="1 predictions, but 2 weights"):
        combine([{}], [1.0, 2.0])
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"weights\[0\] = {weight}"):
            combine([{}], [weight])


EVEN = WindowCost(100.0, 1.0)
FASTER = WindowCost(130.0, 0.9)
LEANER = WindowCost(97.0, 1.01)
SLOWER = WindowCost(50.0, 1.03)
FATTER = WindowCost(103.0, 0.99)


def states(live: list[WindowCost]) -> list[str]:
    judge = Judge()
    found = []
    for cost in live:
        judge.window(cost, EVEN)
        found.append(judge.report()["state"])
    return found


def test_off_until_a_probe_shows_a_gain():
    assert not Judge().is_on
    assert Judge().report()["reason"] == "no comparison yet"
    assert states([EVEN, FASTER, EVEN, EVEN, EVEN]) == ["probe", "on", "on", "on", "on"]
    assert states([EVEN, LEANER]) == ["probe", "on"]


def test_a_probe_without_a_gain_ends():
    assert states([EVEN] * 7) == ["probe", "probe", "off", "off", "off", "off", "probe"]
    assert states([EVEN, SLOWER, FASTER]) == ["probe", "probe", "on"]


def test_one_window_that_is_far_worse_ends_a_probe():
    assert states([EVEN, WindowCost(50.0, 1.2)]) == ["probe", "off"]
    assert states([EVEN, WindowCost(200.0, 1.0)]) == ["probe", "probe"]


@pytest.mark.parametrize("worse", [SLOWER, FATTER])
def test_worse_twice_in_a_row_ends_it(worse):
    assert states([EVEN, FASTER, worse, EVEN, worse, worse]) == ["probe", "on", "on", "on", "on", "off"]


def test_each_time_off_is_twice_as_long():
    judge, run, runs = Judge(), 0, []
    for _ in range(80):
        was_on = judge.is_on
        if not judge.window(SLOWER if was_on else EVEN, EVEN):
            run += 1
        elif run:
            runs.append(run)
            run = 0
    assert runs == [4, 8, 16, 32]


def test_the_decision_can_be_read():
    judge = Judge()
    judge.window(EVEN, EVEN)
    judge.window(FASTER, EVEN)
    report = judge.report()
    assert report["reason"] == "stall -10.0%, bytes +30.0% a token against demand only"
    assert (report["state"], report["is_on"], report["windows"]) == ("on", True, 2)
    assert (report["live_bytes_per_token"], report["ghost_stall_s_per_token"]) == (130.0, 1.0)


def test_where_everything_is_resident_there_is_nothing_to_gain():
    judge = Judge()
    nothing = WindowCost(0.0, 0.0)
    for live in (nothing, nothing, nothing):
        judge.window(live, nothing)
    assert not judge.is_on
    for _ in range(4):
        judge.window(nothing, nothing)
    assert judge.is_on
    judge.window(WindowCost(1.0, 0.0), nothing)
    assert judge.report()["windows_against"] == 1


def test_costs_and_margin_are_checked():
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="stall_s_per_token = "):
            WindowCost(0.0, value)
    with pytest.raises(ValueError, match=r"margin = 1\.0"):
        Judge(margin=1.0)

"""What decides about the batches of a unit: by routes, what it would copy, and whether it pays."""

import numpy as np
import pytest
import torch

from raymoe.inference.predictors import PathPredictor
from raymoe.inference.predictors.path_model import PathNetwork, PathShape
from raymoe.inference.static_grouping import UnitOptions, UnitRoutes, UnitScheduler

SHAPE = PathShape(num_layers=2, num_experts=6, top_k=2, vocab_size=50, vocabulary="", **PathShape.scaled(32))


def routes(predictor: PathPredictor | None = None, residents: np.ndarray | None = None) -> UnitRoutes:
    held = np.zeros((2, 6), dtype=bool) if residents is None else residents
    return UnitRoutes(2, 6, 2, residents=lambda: held, predictor=predictor)


def saw(found: UnitRoutes, experts: dict[str, list[int]]) -> None:
    """Both layers took the same experts."""
    names = list(experts)
    for layer in range(2):
        found.saw(layer, names, torch.tensor([experts[name] for name in names]))


def no_copies(groups) -> int:
    return 0


TOPICS = {"a": [0, 1], "b": [2, 3], "c": [0, 1], "d": [2, 3]}


@pytest.mark.parametrize("method", ["kmedoids", "greedy"])
def test_alike_sequences_come_together_if_the_copies_are_worth_it(method):
    found = routes()
    saw(found, TOPICS)
    scheduler = UnitScheduler(found, 2, UnitOptions(method=method, copy_cost=0.5), expert_bytes=[100, 100])
    groups = scheduler.deal([["a", "b"], ["c", "d"]], no_copies)
    assert groups is not None
    assert sorted(sorted(group.tolist()) for group in groups) == [[0, 2], [1, 3]]
    # eight experts less of 100 bytes each: 1500 bytes at half the price are too much, 1400 are not (the margin is 2 % of 1600)
    for copied, is_dealt in ((1500, True), (1600, False)):
        asked = scheduler.deal([["a", "b"], ["c", "d"]], lambda groups, copied=copied: copied * (groups[0][1] != 1))
        assert (asked is not None) == is_dealt
    assert scheduler.deal([["a", "c"], ["b", "d"]], no_copies) is None


def test_what_is_resident_counts_for_nothing():
    found = routes(residents=np.ones((2, 6), dtype=bool))
    saw(found, TOPICS)
    scheduler = UnitScheduler(found, 2, UnitOptions(), expert_bytes=[100, 100])
    assert scheduler.deal([["a", "b"], ["c", "d"]], no_copies) is None


def test_fewer_batches_are_taken_whatever_the_routes():
    scheduler = UnitScheduler(routes(), 2, UnitOptions(), expert_bytes=[100, 100])
    groups = scheduler.deal([["a"], ["b", "c"], ["d"]], no_copies)
    assert groups is not None
    assert [group.tolist() for group in groups] == [[0, 1], [2, 3]]
    one = scheduler.deal([["a"], ["b"]], no_copies)
    assert one is not None
    assert [group.tolist() for group in one] == [[0, 1]]
    assert scheduler.deal([["a"], ["b", "c"]], no_copies) is None


def test_who_misses_least_goes_first():
    held = np.zeros((2, 6), dtype=bool)
    held[:, 2:4] = True
    found = routes(residents=held)
    saw(found, TOPICS)
    scheduler = UnitScheduler(found, 2, UnitOptions(), expert_bytes=[100, 100])
    assert scheduler.order([["a", "c"], ["b", "d"]]) == [1, 0]
    assert scheduler.order([["b"], ["a", "d"]]) == [0, 1]


def test_it_rests_and_tries_again():
    held = np.zeros((2, 6), dtype=bool)
    held[:, :4] = True
    found = routes(residents=held)
    saw(found, TOPICS)
    scheduler = UnitScheduler(found, 2, UnitOptions(window_steps=4), expert_bytes=[100, 100])
    # in order of arrival it costs just the same
    for _ in range(4):
        scheduler.ran(["a", "b"], [0, 1])
        scheduler.ran(["c", "d"], [2, 3])
    assert not scheduler.is_on
    assert scheduler.stats()["state"] == "off"
    for _ in range(4):
        scheduler.rested()
    assert scheduler.is_on
    scheduler.rested()
    assert scheduler.stats()["state"] == "probing"


@pytest.mark.parametrize("max_requests", [8, 1])
def test_a_path_predictor_is_asked_where_there_is_one(max_requests):
    torch.manual_seed(3)
    network = PathNetwork(SHAPE).eval()
    twin = PathPredictor(network)
    found = routes(PathPredictor(network, max_requests=max_requests))
    prompts = {"a": [3, 4, 5], "b": [6]}
    found.prompts(list(prompts.values()), list(prompts))
    twin.paths(torch.tensor([3, 4, 5, 6]), ["a", "a", "a", "b"])
    saw(found, {"a": [0, 1], "b": [2, 3]})
    found.step_begins([7, 8], ["a", "b"])
    said = twin.paths(torch.tensor([7, 8]), ["a", "b"])
    assert said is not None
    last = np.zeros((2, 2, 6), dtype=bool)
    last[0, :, :2] = last[1, :, 2:4] = True
    if max_requests == 1:
        # it has room for one: nobody knows for which
        assert (found.paths(["a", "b"]) == last).all()
        return
    for row, name in enumerate(prompts):
        likeliest = said[row].topk(2).indices
        expected = torch.zeros(2, 6, dtype=torch.bool).scatter(1, likeliest, True).numpy()
        assert (found.paths([name])[0] == expected).all()
    assert found.source == "path"
    found.ended(["a"])
    assert (found.paths(["a"])[0] == last[0]).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "random"}, "method must be 'kmedoids' or 'greedy', got 'random'"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"window_steps": 0}, "window_steps must be at least 1, got 0"),
        ({"margin": 1.5}, "margin must be from 0 to 1, got 1.5"),
        ({"busy_share": -0.1}, "busy_share must be from 0 to 1"),
        ({"copy_cost": float("inf")}, "copy_cost must be at least 0, got inf"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        UnitOptions(**options)

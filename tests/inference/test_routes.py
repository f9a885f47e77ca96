"""What is remembered of requests' routes."""

import numpy as np
import pytest

from raymoe.inference.routes import LastPaths
from tests.inference.topics import LAYERS


def last_paths(capacity=8, **options):
    return LastPaths(LAYERS, 5, residents=lambda: np.zeros((LAYERS, 5), dtype=bool), capacity=capacity, **options)


def test_the_last_row_of_a_request_is_its_path():
    routes = last_paths()
    rows = ["a", "a", "b"]
    routes.saw(0, rows, np.array([[0, 1], [2, 5], [3, 4], [0, 0]]))
    routes.saw(1, rows, np.array([[0, 1], [5, 5], [3, 4], [0, 0]]))
    used = routes.taken(["b", "x", "a"])
    assert [np.flatnonzero(row).tolist() for row in used[:, 0]] == [[3, 4], [], [2]]
    assert [np.flatnonzero(row).tolist() for row in used[:, 1]] == [[3, 4], [], []]
    assert (routes.paths(["b", "x", "a"]) == used).all()
    routes.saw(0, ["a"], np.array([[1, 3]]))
    assert np.flatnonzero(routes.taken(["a"])[0, 0]).tolist() == [1, 3]


def test_experts_used_in_a_share_of_the_last_tokens_are_expected():
    routes, last = last_paths(), last_paths(decay=0.0)
    for token in range(40):
        for known in (routes, last):
            # 0 always, 1 every other time, 2 long ago, 3 the last time only
            known.saw(0, ["a"], np.array([[0, 1 if token % 2 else 5, 2 if token < 2 else 5, 3 if token == 39 else 5]]))
    assert np.flatnonzero(routes.paths(["a"])[0, 0]).tolist() == [0, 1]
    assert np.flatnonzero(last.paths(["a"])[0, 0]).tolist() == [0, 1, 3]
    assert not routes.paths(["a"])[0, 1].any()


@pytest.mark.parametrize(("option", "value"), [("decay", 1.0), ("share", 0.0)])
def test_path_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .* got {value}"):
        last_paths(**{option: value})


def test_the_ring_forgets_who_came_first():
    routes = last_paths(capacity=2)
    for number in range(3):
        routes.saw(0, [f"r{number}"], np.array([[number]]))
    assert routes.taken(["r0", "r1", "r2"]).any(axis=(1, 2)).tolist() == [False, True, True]


def test_more_ids_than_rows_are_refused():
    with pytest.raises(ValueError, match="expert_index has 1 rows, but 2 rows have a request"):
        last_paths().saw(0, ["a", "b"], np.array([[0]]))

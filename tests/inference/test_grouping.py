"""Groupings against brute force, and what every grouping owes: all requests once, and no more bytes than the order of arrival."""

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.inference.fairness import first_come, must_run
from raymoe.inference.grouping import arrival, cost, greedy, kmedoids, pick

MAKERS = [greedy, kmedoids]


def slow_cost(groups, paths, residents, expert_bytes):
    """The definition, expert by expert."""
    total = 0
    for group in groups:
        for layer in range(paths.shape[1]):
            wanted = {e for r in group for e in range(paths.shape[2]) if paths[r, layer, e] and not residents[layer, e]}
            total += len(wanted) * expert_bytes[layer]
    return total


def best_cost(paths, size, residents):
    """Over all ways to split the requests."""

    def splits(rest):
        if len(rest) <= size:
            yield [rest]
            return
        # some group is not full if the sizes do not come out even: any of them may be
        for count in {size, len(rest) % size or size}:
            for others in itertools.combinations(rest[1:], count - 1):
                group = [rest[0], *others]
                left = [r for r in rest if r not in group]
                yield from ([group, *more] for more in splits(left))

    wanted = -(-len(paths) // size)
    return min(
        cost(groups, paths, residents=residents) for groups in splits(list(range(len(paths)))) if len(groups) == wanted
    )


def topical(rng, num_requests, num_layers, num_experts, chosen, num_topics=4):
    """Paths of requests from topics that prefer experts of their own, in no order."""
    liking = rng.dirichlet(np.full(num_experts, 0.3), size=(num_topics, num_layers)) + 1e-6
    paths = np.zeros((num_requests, num_layers, num_experts), dtype=bool)
    for request in range(num_requests):
        topic = rng.integers(num_topics)
        for layer in range(num_layers):
            p = liking[topic, layer] / liking[topic, layer].sum()
            paths[request, layer, rng.choice(num_experts, chosen, replace=False, p=p)] = True
    return paths


@st.composite
def workloads(draw, max_requests=20):
    num_requests = draw(st.integers(0, max_requests))
    shape = (num_requests, draw(st.integers(1, 3)), draw(st.sampled_from([1, 7, 8, 63, 64, 65, 130])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    paths = rng.random(shape) < draw(st.sampled_from([0.05, 0.3, 1.0]))
    residents = rng.random(shape[1:]) < draw(st.sampled_from([0.0, 0.4]))
    return paths, draw(st.integers(1, 6)), residents, rng.integers(1, 1 << 24, shape[1])


@pytest.mark.parametrize("make", MAKERS)
@settings(deadline=None)
@given(workloads())
def test_every_request_is_in_one_group_and_nothing_costs_more_than_arrival(make, workload):
    paths, size, residents, expert_bytes = workload
    groups = make(paths, size, residents=residents, expert_bytes=expert_bytes)
    assert sorted(np.concatenate([*groups, []]).tolist()) == list(range(len(paths)))
    full, rest = divmod(len(paths), size)
    assert sorted(map(len, groups)) == sorted([size] * full + [rest] * (rest > 0))
    plain = cost(arrival(len(paths), size), paths, residents=residents, expert_bytes=expert_bytes)
    assert cost(groups, paths, residents=residents, expert_bytes=expert_bytes) <= plain


@settings(deadline=None, max_examples=40)
@given(workloads(max_requests=8))
def test_cost_is_its_definition(workload):
    paths, size, residents, expert_bytes = workload
    groups = arrival(len(paths), size)
    found = cost(groups, paths.astype(np.uint8), residents=residents, expert_bytes=expert_bytes)
    assert found == slow_cost(groups, paths, residents, expert_bytes.tolist())


@pytest.mark.parametrize("make", MAKERS)
def test_tiny_cases_are_near_the_best_of_all_splits(make):
    ratios = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        num_requests, size = (6, 2) if seed % 2 else (7, 3)
        paths = topical(rng, num_requests, 2, 12, 3, num_topics=3)
        residents = rng.random((2, 12)) < 0.25
        best = best_cost(paths, size, residents)
        ratios.append(cost(make(paths, size, residents=residents), paths, residents=residents) / max(best, 1))
    # the proven bound of greedy is `size`; in practice it is this near
    assert max(ratios) <= 1.5
    assert statistics.mean(ratios) <= 1.1
    assert min(ratios) >= 1.0


def test_no_exchange_of_two_requests_improves_kmedoids():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        paths, size = topical(rng, 14, 2, 20, 4), 4
        residents = rng.random((2, 20)) < 0.2
        groups = [group.tolist() for group in kmedoids(paths, size, residents=residents, seed=seed)]
        reached = cost(groups, paths, residents=residents)
        for one, other in itertools.combinations(range(len(groups)), 2):
            for i, j in itertools.product(range(len(groups[one])), range(len(groups[other]))):
                changed = [list(group) for group in groups]
                changed[one][i], changed[other][j] = changed[other][j], changed[one][i]
                assert cost(changed, paths, residents=residents) >= reached


@pytest.mark.parametrize("make", MAKERS)
def test_topics_that_share_nothing_are_told_apart(make):
    """Sixteen requests of four topics with four experts each, dealt out in turn."""
    paths = np.zeros((16, 3, 64), dtype=bool)
    for request in range(16):
        paths[request, :, request % 4 * 16 : request % 4 * 16 + 4] = True
    groups = make(paths, 4)
    assert sorted(tuple(group) for group in groups) == [tuple(range(t, 16, 4)) for t in range(4)]
    assert cost(groups, paths) == 4 * 3 * 4
    assert cost(arrival(16, 4), paths) == 4 * 3 * 16


def test_the_same_seed_gives_the_same_groups_and_others_are_no_worse_than_arrival():
    paths = topical(np.random.default_rng(3), 30, 4, 32, 4)
    assert [g.tolist() for g in kmedoids(paths, 5, seed=1)] == [g.tolist() for g in kmedoids(paths, 5, seed=1)]
    assert [g.tolist() for g in greedy(paths, 5)] == [g.tolist() for g in greedy(paths, 5)]
    assert all(cost(kmedoids(paths, 5, seed=s), paths) <= cost(arrival(30, 5), paths) for s in range(5))


@pytest.mark.parametrize("make", MAKERS)
def test_equal_paths_and_small_savings_keep_the_order_of_arrival(make):
    same = np.ones((9, 2, 8), dtype=bool)
    assert [g.tolist() for g in make(same, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    paths = topical(np.random.default_rng(0), 16, 3, 32, 4)
    saved = 1 - cost(make(paths, 4), paths) / cost(arrival(16, 4), paths)
    assert saved > 0.05
    assert [g.tolist() for g in make(paths, 4, margin=saved + 0.01)] == [g.tolist() for g in arrival(16, 4)]


def test_greedy_serves_the_longest_wait_first():
    paths = topical(np.random.default_rng(1), 12, 3, 32, 4)
    waited = np.zeros(12)
    waited[[7, 9]] = 3, 5
    assert 9 in greedy(paths, 3, waited=waited)[0]


def test_residents_cost_nothing():
    """Two pairs: experts 0 and 1 are what the pairs share, but 0 is resident, so it is no reason to be together."""
    paths = np.zeros((4, 1, 8), dtype=bool)
    for request, experts in enumerate([(0, 1), (0, 2), (0, 1), (0, 2)]):
        paths[request, 0, list(experts)] = True
    residents = np.zeros((1, 8), dtype=bool)
    residents[0, 0] = True
    assert cost([[0, 2], [1, 3]], paths, residents=residents, expert_bytes=10) == 20
    assert sorted(g.tolist() for g in greedy(paths, 2, residents=residents)) == [[0, 2], [1, 3]]
    assert set(pick(paths, 2, fixed=[3], residents=residents)) == {3, 1}


def test_pick_starts_with_what_is_fixed_and_takes_the_cheapest_each_time():
    paths = topical(np.random.default_rng(5), 10, 3, 32, 4)
    chosen = pick(paths, 6, fixed=[8, 2]).tolist()
    assert chosen[:2] == [8, 2]
    assert len(set(chosen)) == 6
    for count in range(2, 6):
        now = [cost([[*chosen[:count], r]], paths) for r in range(10) if r not in chosen[:count]]
        assert cost([chosen[: count + 1]], paths) == min(now)
    assert sorted(pick(paths, 20, fixed=[4])) == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": np.ones((3, 4), dtype=bool)}, r"paths must be \[requests, layers, experts\], got shape \(3, 4\)"),
        ({"residents": np.ones((4, 2), dtype=bool)}, r"residents must be \(2, 4\), .* got shape \(4, 2\)"),
        ({"expert_bytes": [1, 2, 3]}, r"expert_bytes must be one number or one for each of 2 layers, got shape \(3,\)"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"waited": [1]}, r"waited must have one entry for each of 3 requests, got shape \(1,\)"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        greedy(**({"paths": np.ones((3, 2, 4), dtype=bool), "size": 2} | arguments))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 5), st.data())
def test_no_wait_exceeds_its_bound_whatever_is_preferred(size, max_wait, data):
    """Requests come and go, and the choice beyond those who must run is hostile: at random, or the same ones always."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    is_stubborn = data.draw(st.booleans())
    waited: list[int] = []
    for _ in range(40):
        waited += [0] * min(int(rng.integers(0, 3)), size * (max_wait + 1) - len(waited))
        chosen = must_run(waited, size, max_wait, first_come)
        assert len(set(chosen)) == len(chosen) <= size
        others = [r for r in range(len(waited)) if r not in chosen]
        chosen += (others if is_stubborn else rng.permutation(others).tolist())[: size - len(chosen)]
        waited = [0 if r in chosen else steps + 1 for r, steps in enumerate(waited)]
        assert max(waited, default=0) <= max_wait
        if waited and rng.random() < 0.2:
            waited.pop(int(rng.integers(len(waited))))


def test_only_as_many_as_needed_must_run():
    assert must_run([], 2, 1, first_come) == []
    assert must_run([0, 0], 2, 1, first_come) == []
    # three with one step to spare, and two places in the next one
    assert must_run([0, 0, 0], 2, 1, first_come) == [0]
    assert must_run([0, 1, 0], 2, 1, first_come) == [1]
    assert must_run([0, 2, 2, 2], 3, 2, first_come) == [1, 2, 3]
    # late ones are served as there are places
    assert must_run([9, 9, 9], 2, 2, first_come) == [0, 1]

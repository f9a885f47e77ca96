"""The benchmark's own parts: steps made of sequences, and rows that belong together."""

import numpy as np
import pytest

from raymoe.benchmarks.cache_policies import decode_steps, measure, token_table


def routes(sequences=4, layers=2, tokens=6, choices=2, experts=8):
    rng = np.random.default_rng(0)
    shape = sequences, layers, tokens
    drawn = [rng.choice(experts, choices, replace=False) for _ in range(int(np.prod(shape)))]
    return np.array(drawn).reshape(*shape, choices).astype(np.int16)


def test_steps_are_tokens_of_sequences_side_by_side():
    experts = routes()
    experts[0, 1, 3] = 8
    trace, rows = decode_steps(experts, 3, 8)
    assert len(trace) == len(rows) == 6
    assert trace[3][1] == sorted(set(experts[1:3, 1, 3].ravel().tolist()))
    assert rows[3].tolist() == [[0, 3], [1, 3], [2, 3]]
    with pytest.raises(ValueError, match="batch = 5: there are 4 sequences"):
        decode_steps(experts, 5, 8)


def test_a_token_that_came_before_is_told_its_experts():
    experts = routes(sequences=1)
    experts[0] = experts[0, :, :1]
    ids = np.full((1, 6), 11)
    _, rows = decode_steps(experts, 1, 8)
    told = token_table(experts, ids, rows, 8)
    assert told(0, 0) == {}
    assert told(4, 1) == {}
    likeliest = sorted(told(4, 0)[1], key=told(4, 0)[1].__getitem__)[-2:]
    assert sorted(likeliest) == sorted(experts[0, 1, 0].tolist())


def test_rows_say_how_far_everyone_is_from_the_bound():
    rows = measure(routes(), np.zeros((4, 6), dtype=int), 8, [1, 2], [25, 50], 10)
    assert {(row["batch"], row["budget"]) for row in rows} == {(1, 25), (1, 50), (2, 25), (2, 50)}
    for row in rows:
        assert row["over_belady"] >= 1.0
        assert (row["policy"] == "bound") <= (row["over_belady"] == 1.0)
        # 2 layers of up to 2 experts a token
        assert row["fetched_per_token"] <= 4.0

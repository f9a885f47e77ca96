"""Synthetic traces: what every row must satisfy, and that presets come near to what they imitate."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.placement.generate import _GRID, PRESETS, LoadSpec, _ends, generate, routed_rows
from raymoe.placement.statistics import trace_statistics
from raymoe.placement.trace import LoadTrace

SIZES: dict[str, Any] = {
    "steps": 6,
    "ranks": 4,
    "layers": 3,
    "experts": 16,
    "tokens_per_rank": 500,
    "choices": 2,
    "seed": 0,
}


def share_of(trace: LoadTrace) -> np.ndarray:
    """Shares of all ranks together, [S, L, E]."""
    load = trace.rows.sum(axis=1)
    return load / load.sum(axis=-1, keepdims=True)


@st.composite
def draws(draw):
    """(popularity [R, L, E], tokens [R], choices); whole orders of magnitude apart, ties and zeros among them."""
    ranks, layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 9))
    choices = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popularity = rng.choice([1e-20, 1e-3, 0.3, 1.0, 1.0, 50.0, 1e6], size=(ranks, layers, experts))
    wanted = rng.random(popularity.shape).argsort(axis=-1) < draw(st.integers(choices, experts))
    tokens = np.array(draw(st.lists(st.integers(0, 300), min_size=ranks, max_size=ranks)))
    return popularity * wanted, tokens, choices


@given(draws(), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_every_token_takes_distinct_experts_that_are_wanted(case, seed):
    popularity, tokens, choices = case
    rows = routed_rows(popularity, tokens, choices, np.random.default_rng(seed))
    assert rows.dtype == np.int64
    assert (rows.sum(axis=-1) == tokens[:, None] * choices).all()
    assert (rows >= 0).all()
    # a table with these two bounds is that of tokens with distinct experts (Gale and Ryser)
    assert (rows <= tokens[:, None, None]).all()
    assert (rows[popularity == 0] == 0).all()


def test_rows_follow_popularity_up_to_every_token():
    popularity = np.array([[[8.0, 1.0, 0.5, 0.25, 0.25]]])
    tokens = 200_000
    rows = routed_rows(popularity, np.array([tokens]), 2, np.random.default_rng(0))[0, 0]
    # 2 * 0.8 is more than every token: the first is always taken, and one choice is left for the rest, in proportion
    assert rows[0] == tokens
    expected = tokens * np.array([0.5, 0.25, 0.125, 0.125])
    # five standard deviations of a binomial count
    assert (np.abs(rows[1:] - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize(
    ("chance", "choices"),
    [
        ([1 + 1e-9, 0.3, 1 + 1e-9, 0.7 - 2e-9], 3),
        ([0.5, 0.5 - 2e-9, 1.0], 2),
        ([0.5, 0.5 - 4e-10, 0.0], 1),
    ],
)
def test_a_rounding_error_gives_no_expert_too_much(chance, choices):
    # errors made larger than floats make them
    width = np.diff(_ends(np.array(chance), choices)) / _GRID
    assert width.sum() == choices
    assert (width >= 0).all()
    assert (width <= 1).all()
    assert (width[np.array(chance) == 0] == 0).all()
    assert width == pytest.approx(chance, abs=1e-8)


def test_several_experts_may_be_taken_by_every_token():
    popularity = np.array([[[1e9, 1e4, 1.0, 1.0]]])
    rows = routed_rows(popularity, np.array([1000]), 3, np.random.default_rng(0))[0, 0]
    assert rows[:2].tolist() == [1000, 1000]
    assert rows[2:].sum() == 1000


def test_a_trace_depends_on_its_arguments_alone():
    trace = generate("bursts", **SIZES)
    np.random.seed(1)  # a global state, which must not matter
    assert (generate("bursts", **SIZES).rows == trace.rows).all()
    assert (generate("bursts", **SIZES | {"seed": 1}).rows != trace.rows).any()
    assert trace.rows.shape == (6, 4, 3, 16)
    assert (trace.rows.sum(axis=-1) == 1000).all()
    assert (trace.choices, trace.tokens_per_rank) == (2, 500)


@pytest.mark.parametrize("preset", PRESETS)
def test_more_steps_leave_the_earlier_ones(preset):
    longer = generate(preset, **SIZES | {"steps": 9})
    assert longer.name == preset
    assert (longer.rows[:6] == generate(preset, **SIZES).rows).all()


# statistic: (measured on the trace that the preset imitates, tolerance as a share of it). Popularity is drawn once a layer, so
# many layers are needed to come near to what the preset gives on average.
TARGETS = {
    "smartmoe": {
        "expert_max_mean": (11.2, 0.1),
        "top1_share": (0.35, 0.1),
        "top2_share": (0.54, 0.1),
        "top4_share": (0.73, 0.1),
        "top8_share": (0.90, 0.1),
        "gini": (0.80, 0.05),
        "zero_share": (0.28, 0.2),
        "device_max_mean": (6.0, 0.1),
        "drift": (0.022, 0.15),
        "rank_distance": (0.019, 0.15),
    },
    "early": {"device_max_mean": (6.6, 0.1), "drift": (0.31, 0.1), "top4_share": (0.86, 0.12), "gini": (0.82, 0.05)},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("preset", TARGETS)
def test_presets_come_near_to_what_they_imitate(preset, seed):
    trace = generate(preset, steps=4, ranks=16, layers=160, experts=32, tokens_per_rank=8192, choices=2, seed=seed)
    found = trace_statistics(trace)
    for name, (target, tolerance) in TARGETS[preset].items():
        assert found[name] == pytest.approx(target, rel=tolerance), name


def test_smartmoe_drifts_on_but_not_away():
    sizes = {"ranks": 2, "layers": 24, "experts": 32, "tokens_per_rank": 65536, "choices": 2, "seed": 0}
    share = share_of(generate("smartmoe", steps=101, **sizes))
    apart = {lag: (np.abs(share[lag:] - share[:-lag]).sum(axis=-1) / 2).mean() for lag in (10, 100)}
    # measured: 0.060 and 0.130; one sample of 24 layers scatters by a tenth
    assert apart[10] == pytest.approx(0.060, rel=0.2)
    assert apart[100] == pytest.approx(0.130, rel=0.25)


MODERN: dict[str, Any] = {
    "steps": 8,
    "ranks": 32,
    "layers": 24,
    "experts": 64,
    "tokens_per_rank": 1024,
    "choices": 4,
    "seed": 0,
}


def test_modern_is_mild():
    found = trace_statistics(generate("modern", **MODERN))
    assert found["device_max_mean"] == pytest.approx(1.7, rel=0.05)
    assert found["zero_share"] < 1e-3


def test_bursts_come_and_go_within_three_steps():
    spec = PRESETS["bursts"]
    calm, bursting = (share_of(generate(name, **MODERN | {"steps": 12, "layers": 12})) for name in ("modern", "bursts"))
    # both draw the same popularity, so what is not a burst is the same but for chance
    is_hot = bursting > 4 * calm
    began = is_hot[1:] & ~is_hot[:-1]
    assert 0.3 < began.any(axis=-1).mean() / spec.burst_probability < 2.0
    for step, layer, expert in np.argwhere(began[:-3]):
        lasted = is_hot[step + 1 :, layer, expert]
        assert lasted[:3].all()
        assert not lasted[3]


def test_balanced_and_zipf_do_not_move():
    sizes = SIZES | {"tokens_per_rank": 100_000, "experts": 8, "choices": 1}
    balanced, zipf = share_of(generate("balanced", **sizes)), share_of(generate("zipf", **sizes))
    assert balanced == pytest.approx(np.full(balanced.shape, 1 / 8), rel=0.03)
    harmonic = sum(1 / place for place in range(1, 9))
    expected = [1 / place / harmonic for place in range(8, 0, -1)]
    assert np.sort(zipf, axis=-1) == pytest.approx(np.broadcast_to(expected, zipf.shape), rel=0.05)
    assert len({tuple(layer.argsort()) for layer in zipf[0]}) == 3


def test_the_wildest_popularity_still_gives_each_token_its_experts():
    spec = LoadSpec(zipf=200.0, dirichlet=1e-3, drift_sigma=500.0, burst_probability=1.0, burst_size=1e300)
    rows = generate(spec, **SIZES | {"choices": 5}).rows
    assert (rows.sum(axis=-1) == 2500).all()
    assert rows.max() == 500


def test_rank_noise_sets_ranks_apart():
    apart = [
        trace_statistics(generate(LoadSpec(rank_noise=noise), **SIZES | {"tokens_per_rank": 20_000}))["rank_distance"]
        for noise in (0.0, 0.1, 0.4)
    ]
    # half the mean of |N(0, noise)|, less what the ranks' mean shares with a rank of four
    assert apart[0] < 0.01
    assert apart[1:] == pytest.approx([0.4 * noise * np.sqrt(3 / 4) for noise in (0.1, 0.4)], rel=0.2)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("zipf", -1.0, "zipf = -1.0: must be a number of at least 0"),
        ("dirichlet", 0.0, "dirichlet = 0.0: must be above 0, or None"),
        ("drift_rho", 1.0, "drift_rho = 1.0: must be below 1"),
        ("drift_sigma", float("nan"), "drift_sigma = nan"),
        ("burst_probability", 1.5, "a probability is at most 1"),
        ("burst_size", 0.5, "burst_size = 0.5: must be at least 1"),
        ("burst_steps", 0, "burst_steps = 0: must be a whole number from 1"),
        ("burst_steps", 2.5, "burst_steps = 2.5: must be a whole number from 1"),
    ],
)
def test_a_bad_spec_names_the_field(field, value, said):
    with pytest.raises(ValueError, match=said):
        LoadSpec(**{field: value})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"tokens_per_rank": 0}, "tokens_per_rank = 0"),
        ({"choices": 17}, "choices = 17: a token takes distinct experts, and there are only 16"),
        ({"seed": -1}, "seed = -1: must not be negative"),
    ],
)
def test_bad_sizes_are_named(changed, said):
    with pytest.raises(ValueError, match=said):
        generate("zipf", **SIZES | changed)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="no load preset 'moderm'; there are: smartmoe, modern, balanced"):
        generate("moderm", **SIZES)

import math

import pytest
import torch

from raymoe.inference import SamplingParams
from raymoe.inference.sampling import sample, uniform

LOGITS = torch.tensor([1.0, 3.0, 0.0, 2.0, -1.0, 2.5])


def frequencies(params: SamplingParams, draws: int = 4000) -> torch.Tensor:
    numbers = [uniform(params.seed, position) for position in range(draws)]
    tokens = sample(LOGITS.expand(draws, -1), [params] * draws, numbers)
    return torch.bincount(tokens, minlength=len(LOGITS)) / draws


# 4000 draws: a frequency is within 4 standard deviations, 4 * sqrt(0.25 / 4000) = 0.032
CLOSE = {"atol": 0.032, "rtol": 0.0}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    params = SamplingParams(temperature=temperature, seed=1)
    torch.testing.assert_close(frequencies(params), (LOGITS / temperature).softmax(0), **CLOSE)


def test_top_k_draws_among_the_likeliest():
    kept = torch.tensor([-math.inf, 3.0, -math.inf, 2.0, -math.inf, 2.5])
    found = frequencies(SamplingParams(top_k=3, seed=2))
    torch.testing.assert_close(found, kept.softmax(0), **CLOSE)
    assert (found[torch.isinf(kept)] == 0).all()


def test_top_p_keeps_the_token_that_crosses_it():
    # 0.45, 0.27, 0.17, ...: two tokens have 0.72, so 0.8 needs the third
    kept = torch.tensor([-math.inf, 3.0, -math.inf, 2.0, -math.inf, 2.5])
    found = frequencies(SamplingParams(top_p=0.8, seed=3))
    torch.testing.assert_close(found, kept.softmax(0), **CLOSE)
    assert (found[torch.isinf(kept)] == 0).all()


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}])
def test_these_are_greedy(params):
    assert frequencies(SamplingParams(seed=4, **params), draws=50)[1] == 1.0


def test_rows_do_not_see_each_other():
    """A row's token is the same alone and among others that are drawn in other ways."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=5),
        SamplingParams(seed=3, top_p=0.3),
        SamplingParams(seed=4, temperature=1.7, top_k=20, top_p=0.9),
        SamplingParams(seed=5, top_k=500),
    ]
    draws = [uniform(asked.seed, 7) for asked in params]
    together = sample(logits, params, draws)
    alone = [sample(logits[row : row + 1], params[row : row + 1], draws[row : row + 1]) for row in range(6)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_equal_logits_are_told_apart_by_the_draw_alone():
    tokens = sample(torch.zeros(4, 4), [SamplingParams()] * 4, [0.0, 0.26, 0.51, 0.999])
    assert tokens.tolist() == [0, 1, 2, 3]


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]])
    for draw in (0.0, 0.5, 1 - 2**-52):
        assert sample(logits, [SamplingParams()], [draw]).tolist() == [1]


def test_the_random_number_is_uniform_and_depends_on_seed_and_position():
    numbers = torch.tensor([uniform(seed, position) for seed in range(-20, 20) for position in range(100)])
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    assert len(numbers.unique()) == len(numbers)
    # 4000 numbers in 10 bins: 4 standard deviations of a bin are 76
    assert (torch.histc(numbers, bins=10, min=0, max=1) - 400).abs().max() < 76


def test_requests_without_a_seed_differ():
    assert SamplingParams().seed != SamplingParams().seed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("seed", 1 << 64),
        ("stop_token_ids", (-1,)),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})

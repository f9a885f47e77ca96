"""Prompts that begin alike are read once, and nobody can tell from the tokens."""

from raymoe.inference import SamplingParams
from tests.inference.conftest import generate_alone, random_prompts

(BEGINNING,) = random_prompts([70])
"""Two whole pages of 32 tokens, and six more."""
PROMPTS = [[*BEGINNING, *end] for end in random_prompts([3, 9, 40, 1], seed=1)] + [BEGINNING, BEGINNING[:40]]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=())


def test_shared_beginnings_are_read_once_and_change_no_token(saved_model, make_engine):
    model, _ = saved_model("olmoe")
    truth = [generate_alone(model, prompt, 8) for prompt in PROMPTS]
    shared, alone = make_engine(), make_engine(prefix_sharing=False)
    for engine in (shared, alone):
        # the first fills the pages that the others find
        answers = engine.generate(PROMPTS[:1], greedy(8)) + engine.generate(PROMPTS[1:], greedy(8))
        assert answers == truth
    # two pages each; one for the prompt of 40 tokens
    assert shared.stats()["shared_tokens"] == 4 * 64 + 32
    assert alone.stats()["shared_tokens"] == 0
    assert shared.stats()["prompt_tokens"] == alone.stats()["prompt_tokens"] == sum(map(len, PROMPTS))


def test_drawn_tokens_are_the_same_with_and_without(make_engine):
    params = [SamplingParams(max_tokens=10, seed=seed, top_p=0.9, stop_token_ids=()) for seed in range(len(PROMPTS))]
    found = []
    for is_shared in (True, False):
        engine = make_engine(prefix_sharing=is_shared)
        engine.generate(PROMPTS[:1], greedy(1))
        found.append(engine.generate(PROMPTS, params))
    assert found[0] == found[1]


def test_a_full_kv_cache_with_shared_pages_changes_no_token(saved_model, make_engine):
    model, _ = saved_model("olmoe")
    engine = make_engine(kv_tokens=192, max_batch_tokens=48)
    engine.generate(PROMPTS[:1], greedy(1))
    assert engine.generate(PROMPTS, greedy(30)) == [generate_alone(model, prompt, 30) for prompt in PROMPTS]
    assert engine.stats()["shared_tokens"] > 0

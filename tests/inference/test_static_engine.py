"""Static batches through the expert cache: the tokens of transformers' own `generate` on the whole model, one input at a time."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from raymoe.inference import SamplingParams
from raymoe.inference.static_engine import StaticEngine, StaticInput
from raymoe.inference.static_grouping import UnitOptions
from tests.inference.conftest import random_prompts
from tests.inference.static_models import EAGER, LENGTHS, config, lively_switch, saved, truth
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("family", "num_batches", "stride"),
    [("switch", 1, 1), ("switch", 3, 1), ("switch", 2, 4), ("olmoe", 1, 1), ("olmoe", 3, 2), ("gpt_oss", 3, 1),
     ("deepseek_v3", 2, 1)],
)  # fmt: skip
def test_tokens_are_those_of_the_whole_model_at_every_budget(family, num_batches, stride):
    model, path = saved(family)
    prompts = random_prompts(LENGTHS)
    expected = truth(model, prompts, max_new_tokens=12)
    assert len({token for answer in expected for token in answer}) > 10
    grouping = UnitOptions(margin=0.0, copy_cost=0.0, stride=stride)
    for budget in ("100%", "50%", "one expert"):
        expert_memory = one_expert(path) if budget == "one expert" else budget
        # without readers nothing is fetched between steps, and every byte is a step's
        with StaticEngine(path, expert_memory=expert_memory, expert_readers=0) as engine:
            options = {"batch_size": 2, "num_batches": num_batches, "config": config(), "grouping": grouping}
            assert engine.generate(prompts, **options) == expected, budget
            stats = engine.stats()
            assert engine.cache.resident <= stats["slots"]
            assert stats["generated_tokens"] == sum(map(len, expected))
            assert stats["prompt_tokens"] == sum(LENGTHS)
            assert stats["prompt_bytes"] + stats["decode_bytes"] == engine.cache.total.fetched_bytes


def one_expert(path) -> int:
    with StaticEngine(path, expert_memory="100%") as engine:
        return engine.cache.slot_bytes


def test_sequences_end_early_each_at_its_own_place():
    """The end token is one that answers hold at different places, so batches shrink, merge and vanish."""
    for family in ("switch", "olmoe"):
        model, path = saved(family)
        prompts = random_prompts([*LENGTHS, 6, 2], seed=3)
        free = truth(model, prompts, max_new_tokens=16, eos_token_id=None)
        ends = [answer[i] for i, answer in enumerate(free[:4])]
        expected = truth(model, prompts, max_new_tokens=16, eos_token_id=ends)
        assert len({len(answer) for answer in expected}) > 2
        with StaticEngine(path, expert_memory="50%") as engine:
            options = {"config": config(max_new_tokens=16, eos_token_id=ends), "grouping": EAGER}
            answers = list(engine.run([StaticInput(p) for p in prompts], batch_size=3, num_batches=2, **options))
        assert {answer.number: answer.tokens for answer in answers} == dict(enumerate(expected))
        for answer in answers:
            assert answer.finish_reason == ("stop" if answer.tokens[-1] in ends else "length")


def test_answers_come_before_later_units_are_read():
    _, path = saved("olmoe")
    taken = []

    def inputs():
        for number, prompt in enumerate(random_prompts([4] * 6)):
            taken.append(number)
            yield StaticInput(prompt)

    with StaticEngine(path) as engine:
        answers = engine.run(inputs(), batch_size=2, config=config(max_new_tokens=3))
        assert next(answers).number == 0
        assert taken == [0, 1]
        assert [answer.number for answer in answers] == [1, 2, 3, 4, 5]


def test_right_padding_takes_no_capacity():
    """A token fills an expert's capacity, so padding that counted before one would drop it."""
    model, path = saved("switch")
    prompts = random_prompts([20, 1, 9])
    expected = truth(model, prompts, max_new_tokens=12)
    with StaticEngine(path, expert_memory="100%") as engine:
        assert engine.generate(prompts, batch_size=3, config=config()) == expected
    roomy = truth(lively_switch(expert_capacity=64), prompts, max_new_tokens=12)
    assert [one == other for one, other in zip(expected, roomy, strict=True)] == [False, True, False]


def test_padding_wants_no_expert():
    """A batch wants the union of what its inputs want alone, whatever their lengths."""
    for family in ("switch", "olmoe"):
        _, path = saved(family)
        prompts = random_prompts([30, 1, 1], seed=5)
        wanted = {}
        for name, rows in {"short": prompts[1:], "all": prompts}.items():
            with StaticEngine(path, expert_memory="100%") as engine:
                engine.generate(rows, batch_size=3, config=config(max_new_tokens=1))
                wanted[name] = engine.cache.resident
        with StaticEngine(path, expert_memory="100%") as engine:
            engine.generate(prompts, batch_size=1, config=config(max_new_tokens=1))
            assert wanted["all"] == engine.cache.resident
        assert wanted["short"] < wanted["all"]


@pytest.mark.parametrize("family", ["switch", "olmoe"])
def test_sampled_tokens_depend_on_the_seed_alone(family):
    _, path = saved(family)
    prompts = random_prompts(LENGTHS)
    drawn = config(do_sample=True, temperature=1.3, top_k=0, top_p=0.9, eos_token_id=None)
    inputs = [StaticInput(prompt, seed=100 + n) for n, prompt in enumerate(prompts)]
    with StaticEngine(path, expert_memory="50%") as engine:

        def tokens(rows: list[StaticInput], **options: Any) -> list[list[int]]:
            return [a.tokens for a in sorted(engine.run(rows, config=drawn, **options), key=lambda a: a.number)]

        together = tokens(inputs, batch_size=3, num_batches=3, grouping=EAGER)
        assert together == [tokens([row])[0] for row in inputs]
        assert together == tokens(inputs[::-1], batch_size=4)[::-1]
        assert tokens([StaticInput(prompts[0], seed=1)]) != together[:1]


def test_a_seed_gives_the_tokens_of_the_serving_engine(saved_model, make_engine):
    _, path = saved_model("olmoe")
    prompts = random_prompts([5, 11, 2])
    params = [SamplingParams(max_tokens=10, seed=seed, temperature=0.8, stop_token_ids=()) for seed in (7, 8, 9)]
    served = make_engine().generate(prompts, params)
    with StaticEngine(path) as engine:
        drawn = config(max_new_tokens=10, do_sample=True, temperature=0.8, top_k=0, eos_token_id=None)
        assert engine.generate(prompts, seed=7, config=drawn) == served


@pytest.mark.parametrize("family", ["switch", "olmoe"])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5},
        {"min_new_tokens": 9, "eos_token_id": list(range(1, 60))},
        {"forced_eos_token_id": 5, "eos_token_id": 5},
        {"bad_words_ids": [[n] for n in range(1, 90, 2)]},
        {"suppress_tokens": list(range(1, 90, 3))},
        {"sequence_bias": [[[7], 4.0], [[8, 9], -3.0]]},
    ],
)
def test_transformers_processors_see_a_sequence_without_its_padding(family, options):
    model, path = saved(family)
    prompts = random_prompts([3, 9, 6])
    expected = truth(model, prompts, max_new_tokens=12, **options)
    with StaticEngine(path) as engine:
        assert engine.generate(prompts, config=config(**options)) == expected


def test_lengths_follow_the_configurations_as_in_transformers(tmp_path):
    prompts = random_prompts([4, 9])
    for family in ("switch", "olmoe"):
        model, path = saved(family)
        with StaticEngine(path) as engine:
            for options in ({"max_length": 15}, {}):
                found = engine.generate(prompts, config=GenerationConfig(do_sample=False, **options))
                assert found == truth(model, prompts, **options)
    model = tiny_model("olmoe")
    model.generation_config.update(max_new_tokens=5, repetition_penalty=1.5)
    model.save_pretrained(tmp_path)
    with StaticEngine(tmp_path) as engine:
        assert engine.generate(prompts) == truth(model, prompts)
        assert engine.generate(prompts, config=GenerationConfig(max_new_tokens=2)) == truth(
            model, prompts, max_new_tokens=2
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "it asks for beam search; static batches are decoded greedily or sampled"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences = 2 is not supported"),
        ({"stop_strings": ["x"]}, r"stop_strings = \['x'\] is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "it asks for assisted generation"),
        ({"max_time": 1.0}, "max_time = 1.0 is not supported"),
    ],
)
def test_what_static_batches_cannot_do_is_named(options, said):
    with StaticEngine(saved("olmoe")[1]) as engine, pytest.raises(ValueError, match=said):
        engine.generate([[3]], config=config(**options))


def test_bad_inputs_are_named():
    for family in ("switch", "olmoe"):
        with StaticEngine(saved(family)[1]) as engine:
            for inputs, said in (
                ([[3], []], "input 1: it is empty"),
                ([[96]], "input 0: token 96 is not in the model's vocabulary of 96"),
            ):
                with pytest.raises(ValueError, match=said):
                    engine.generate(inputs)
            with pytest.raises(ValueError, match="row 7: token -1 is not"):
                engine.check([StaticInput([3]), StaticInput([-1], place="row 7")])
            for name in ("batch_size", "num_batches"):
                with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
                    engine.generate([[3]], **{name: 0})
    with StaticEngine(saved("olmoe")[1]) as engine:
        with pytest.raises(
            ValueError, match="input 0: 250 tokens and an answer of up to 7 are 257, but the model has 256"
        ):
            engine.generate([[3] * 250], config=config(max_new_tokens=7))
        with pytest.raises(ValueError, match="input 0: 9 tokens leave no room for an answer, as max_length is 9"):
            engine.generate([[3] * 9], config=GenerationConfig(max_length=9))
    with pytest.raises(ValueError, match="expert_memory: 1 is 1 bytes, less than one expert"):
        StaticEngine(saved("switch")[1], expert_memory=1)


@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=7),
    batch_size=st.integers(1, 4),
    num_batches=st.integers(1, 3),
    stride=st.integers(1, 5),
    seed=st.integers(0, 1),
)
def test_any_shape_gives_the_same_answers(lengths, batch_size, num_batches, stride, seed):
    model, path = saved("switch")
    prompts = [prompt[:length] for prompt, length in zip(random_prompts([6] * 7, seed), lengths, strict=False)]
    ends = [1, 5, 17, 40]
    expected = truth(model, prompts, max_new_tokens=9, eos_token_id=ends)
    grouping = UnitOptions(margin=0.0, copy_cost=0.0, stride=stride, method="greedy" if seed % 2 else "kmedoids")
    with StaticEngine(path, expert_memory="30%") as engine:
        options = {"config": config(max_new_tokens=9, eos_token_id=ends), "grouping": grouping}
        assert engine.generate(prompts, batch_size=batch_size, num_batches=num_batches, **options) == expected


def test_bfloat16_answers():
    for family in ("switch", "olmoe"):
        with StaticEngine(saved(family)[1], dtype="bfloat16", expert_memory="50%") as engine:
            answers = engine.generate(random_prompts([3, 5]), config=config(max_new_tokens=4, eos_token_id=None))
            assert [len(answer) for answer in answers] == [4, 4]

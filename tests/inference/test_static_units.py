"""Batches of a unit: what predictors are told of them, and what grouping brings."""

from typing import Any

import pytest
import torch

from raymoe.inference import static_engine
from raymoe.inference.predictors import Judge
from raymoe.inference.static_engine import StaticEngine, StaticInput
from raymoe.inference.static_grouping import UnitOptions
from tests.inference.conftest import random_prompts
from tests.inference.static_models import EAGER, LENGTHS, config, saved, truth
from tests.tiny_models import tiny_model


@pytest.fixture
def told(monkeypatch) -> "Told":
    """What stands for the engine's `Foresight`."""
    told = Told()
    monkeypatch.setattr(static_engine, "Foresight", told.made)
    return told


def test_a_run_that_is_left_lets_go_of_its_sequences(told):
    with StaticEngine(saved("olmoe")[1]) as engine:
        answers = engine.run([StaticInput(p) for p in random_prompts([3] * 5)], batch_size=2, num_batches=2)
        next(answers)
        answers.close()
        assert sorted(told.over) == [f"sequence-{n}" for n in range(4)]
        assert engine.generate([[3, 4]], config=config(max_new_tokens=2))


class Told:
    """Notes what a `Foresight` would be told."""

    def __init__(self):
        self.steps: list[tuple[list[int], list[str]]] = []
        self.layers: list[list[tuple[int, int, list[list[int]], list[int]]]] = []
        self.over: list[str] = []
        self.cache: Any = None
        self.facts: dict[str, Any] = {}

    def made(self, cache, predictors, **facts):
        self.cache, self.facts = cache, facts
        return self

    def step_begins(self, token_ids, requests):
        self.steps.append((token_ids.tolist(), list(requests)))
        self.layers.append([])

    def routed(self, layer, hidden, expert_index, wanted):
        self.layers[-1].append((layer, len(hidden), expert_index.tolist(), list(wanted)))

    def ended(self, request):
        self.over.append(request)


@pytest.mark.parametrize("family", ["switch", "olmoe"])
def test_who_foretells_hears_of_the_decoder_without_padding(told, family):
    prompts = random_prompts([5, 2, 7])
    with StaticEngine(saved(family)[1]) as engine:
        answers = engine.generate(prompts, batch_size=3, config=config(max_new_tokens=4, eos_token_id=None))
    is_switch = family == "switch"
    first_ids, first_names = told.steps[0]
    assert first_ids == ([0, 0, 0] if is_switch else [token for prompt in prompts for token in prompt])
    lengths = [1, 1, 1] if is_switch else [5, 2, 7]
    assert first_names == [f"sequence-{n}" for n, length in enumerate(lengths) for _ in range(length)]
    assert [ids for ids, _ in told.steps[1:]] == [[a[step] for a in answers] for step in range(3)]
    for (ids, _), layers in zip(told.steps, told.layers, strict=True):
        assert [layer for layer, *_ in layers] == [0, 1]
        for _, num_hidden, index, wanted in layers:
            assert num_hidden == len(index) == len(ids)
            assert sorted(wanted) == sorted({expert for row in index for expert in row})
    assert told.over == ["sequence-0", "sequence-1", "sequence-2"]


def test_predictors_see_the_cache_with_the_decoders_layers(told):
    with StaticEngine(saved("switch")[1], expert_memory="100%") as engine:
        cache = told.cache
        assert (cache.num_experts, cache.num_slots, told.facts["num_experts"]) == (10, 20, [5, 5])
        engine.generate([[3, 4, 5]], config=config(max_new_tokens=2))
        assert (cache.residents() == engine.cache.residents()[2:]).all()
        # three tokens went through the encoder, two through the decoder
        assert cache.totals().misses == cache.residents().sum()
        assert engine.cache.total.misses == engine.cache.resident
        calls = []
        engine.cache.expect = lambda layer, probability: calls.append((layer, probability))
        engine.cache.wish = lambda keys: calls.append(list(keys))
        cache.expect(1, {4: 0.5})
        cache.wish([(0, 3), (1, 2)])
        assert calls == [(3, {4: 0.5}), [(2, 3), (3, 2)]]


@pytest.mark.parametrize("family", ["switch", "olmoe"])
def test_predictors_change_no_token(family):
    """With all of them heeded from the first step on, whether they are right or not."""
    model, path = saved(family)
    prompts = random_prompts(LENGTHS)
    names = ("look_ahead", "token_table", "transitions", "path")
    with (
        StaticEngine(path, expert_memory="40%", predictors=names, expert_readers=1) as engine,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(Judge, "is_on", True)
        answers = engine.generate(prompts, batch_size=2, num_batches=2, config=config(), grouping=EAGER)
        assert engine.cache.total.prefetched > 0
        report = engine.stats()["prediction"]["predictors"]
    assert answers == truth(model, prompts, max_new_tokens=12)
    assert [arm["predictor"] for arm in report] == ["look_ahead", "token_table", "transitions"], "no path was trained"


@pytest.fixture(scope="module")
def two_topics(tmp_path_factory):
    """An OLMoE whose tokens choose experts by their parity, and whose answers keep the parity of their prompt: two topics that have
    no expert in common."""
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    with torch.no_grad():
        odd = torch.arange(model.config.vocab_size) % 2 == 1
        embedding = model.get_input_embeddings().weight
        embedding.mul_(0.3)
        embedding[:, 0] = torch.where(odd, 3.0, -3.0)
        model.lm_head.weight[:, 0] = torch.where(odd, 3.0, -3.0)
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(0.5)
            layer.mlp.gate.weight[:, 0] = torch.where(torch.arange(8) >= 4, 4.0, -4.0)
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.experts.down_proj.mul_(0.1)
    path = tmp_path_factory.mktemp("two_topics")
    model.save_pretrained(path)
    return model, path


def test_grouping_brings_together_what_wants_the_same_experts(two_topics):
    model, path = two_topics
    topics = [0, 0, 1, 1, 0, 0, 1, 1]
    prompts = [[2 + topic + 2 * k for k in range(3 + n)] for n, topic in enumerate(topics)]
    expected = truth(model, prompts, max_new_tokens=40, eos_token_id=None)
    assert [{token % 2 for token in answer} for answer in expected] == [{topic} for topic in topics]
    row = {}
    for num_batches in (1, 2):
        with StaticEngine(path, expert_memory="25%") as engine:
            settings_ = config(max_new_tokens=40, eos_token_id=None)
            assert engine.generate(prompts, batch_size=4, num_batches=num_batches, config=settings_) == expected
            row[num_batches] = engine.stats()
    assert row[2]["grouping"]["state"] == "on"
    assert row[2]["moved_sequences"] == 4
    assert row[2]["regroupings"] == 1
    assert row[2]["experts_per_step"] < 0.7 * row[1]["experts_per_step"]
    assert row[2]["decode_bytes"] < 0.7 * row[1]["decode_bytes"]


def test_grouping_rests_where_nothing_is_to_be_gained():
    """Random routers: what is chosen costs as much as the order of arrival, and batches then run one after the other."""
    _, path = saved("olmoe")
    prompts = random_prompts([4] * 4)
    with StaticEngine(path, expert_memory="50%") as engine:
        options = {
            "config": config(max_new_tokens=60, eos_token_id=None),
            "grouping": UnitOptions(margin=0.5, window_steps=8),
        }
        engine.generate(prompts, batch_size=2, num_batches=2, **options)
        assert engine.stats()["grouping"]["state"] != "on"
        assert engine.stats()["moved_sequences"] == 0
    with StaticEngine(path, expert_memory="100%") as engine:
        engine.generate(prompts, batch_size=2, num_batches=2, config=config())
        assert engine.stats()["grouping"] == {"state": "off", "reason": "all is resident"}

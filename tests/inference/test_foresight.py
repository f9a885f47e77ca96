"""Predictions at work: predictors that are right, wrong and slow, on a cache that is too small."""

import time

import pytest
import torch

from raymoe.inference import SamplingParams
from raymoe.inference.eviction import LeastRecentlyUsed
from raymoe.inference.foresight import Foresight
from tests.inference.conftest import random_prompts
from tests.inference.test_cache import EXPERTS, LAYERS, NUMEL, NumberedExperts, make_cache

HIDDEN = torch.zeros(1, 4)


def wanted_at(step: int, layer: int) -> list[int]:
    """Two experts, other ones at each of three steps, which is just too much for three slots a layer."""
    first = 2 * ((step + layer) % (EXPERTS // 2))
    return [first, first + 1]


class Scripted:
    """Says at each layer what the next one will want, or what it will not."""

    name = "scripted"

    def __init__(self, *, is_right: bool = True, takes_s: float = 0.0):
        self.is_right, self.takes_s = is_right, takes_s
        self.step = 0
        self.calls = 0
        self.forgotten: list[str] = []

    def step_begins(self, token_ids, requests):
        self.calls += 1
        return self._about(self.step, 0)

    def routed(self, layer, hidden, expert_index):
        self.calls += 1
        time.sleep(self.takes_s)
        return self._about(self.step, layer + 1) if layer + 1 < LAYERS else self._about(self.step + 1, 0)

    def forget(self, request):
        self.forgotten.append(request)

    def _about(self, step, layer):
        wanted = wanted_at(step if self.is_right else step + 1, layer)
        answer = torch.full((EXPERTS,), 0.01)
        answer[wanted] = 0.99
        return {layer: answer}


class Everything(Scripted):
    """Names all experts always."""

    def _about(self, step, layer):
        return {layer: torch.full((EXPERTS,), 0.99)}


def drive(predictor: Scripted, steps: int, *, slots: int = 9, window_steps: int = 4):
    """Runs steps through a cache with one reading thread; returns (foresight, cache)."""
    cache = make_cache(slots, NumberedExperts(delay_s=0.0005), readers=1)
    foresight = Foresight(
        cache,
        [predictor],
        num_experts=[EXPERTS] * LAYERS,
        expert_bytes=[4 * NUMEL] * LAYERS,
        policy=LeastRecentlyUsed,
        fetch_s=0.001,
        window_steps=window_steps,
    )
    for step in range(steps):
        predictor.step = step
        foresight.step_begins(torch.tensor([5]), ["a"])
        for layer in range(LAYERS):
            wanted = wanted_at(step, layer)
            groups = cache.acquire(layer, wanted)
            foresight.routed(layer, HIDDEN, torch.tensor([wanted]), wanted)
            for _ in groups:
                time.sleep(0.001)
    cache.close()
    return foresight, cache


def test_who_is_right_is_heeded_after_one_window():
    foresight, cache = drive(Scripted(), 120)
    report = foresight.report()
    assert report["predictors"][0]["state"] == "on"
    assert report["predictors"][0]["precision"] > 0.95
    assert report["predictors"][0]["recall"] > 0.6
    assert cache.total.prefetched > 0
    # what was fetched ahead was used
    assert cache.total.wasted <= 0.05 * cache.total.prefetched
    assert report["is_on"], report


def test_who_is_wrong_is_no_longer_asked():
    predictor = Scripted(is_right=False)
    foresight, cache = drive(predictor, 60)
    report = foresight.report()["predictors"][0]
    assert report["precision"] < 0.2
    assert "worse" in report["reason"] or "+" in report["reason"], report
    # 60 steps of 4 calls, had it always been asked
    assert predictor.calls < 120


def test_naming_everything_does_not_pay():
    foresight, _ = drive(Everything(), 80)
    report = foresight.report()["predictors"][0]
    assert report["recall"] == 1.0
    assert report["state"] != "on"
    assert report["wasted_bytes"] > 0


def test_who_takes_longer_than_he_saves_is_not_heeded():
    foresight, _ = drive(Scripted(takes_s=0.02), 40)
    report = foresight.report()["predictors"][0]
    assert report["precision"] > 0.95
    assert report["state"] != "on"


def test_where_all_is_resident_nobody_is_asked():
    predictor = Scripted()
    foresight, cache = drive(predictor, 30, slots=LAYERS * EXPERTS)
    assert predictor.calls == 0
    assert foresight.report()["reason"] == "all is resident"
    assert cache.total.misses == LAYERS * EXPERTS


def test_a_request_that_is_over_is_forgotten_with_the_next_step():
    predictor = Scripted()
    foresight, _ = drive(predictor, 1)
    foresight.ended("a")
    assert predictor.forgotten == []
    foresight.step_begins(torch.tensor([5]), ["b"])
    assert predictor.forgotten == ["a"]


@pytest.mark.parametrize("readers", [0, 2])
def test_predictors_change_no_token(make_engine, readers):
    prompts, params = random_prompts([3, 17, 40, 5]), SamplingParams(max_tokens=40, temperature=0.0, stop_token_ids=())
    engine = make_engine(
        expert_memory="25%", expert_readers=readers, predictors=("look_ahead", "token_table", "transitions")
    )
    expected = make_engine(expert_memory="100%").generate(prompts, params)
    assert [engine.generate(prompts, params) for _ in range(3)] == [expected] * 3
    told = engine.stats()["prediction"]
    assert [each["predictor"] for each in told["predictors"]] == ["look_ahead", "token_table", "transitions"]
    assert told["windows"] >= 3
    assert all(0.0 <= each["recall"] <= 1.0 for each in told["predictors"])


def test_an_unknown_predictor_is_named(make_engine):
    with pytest.raises(ValueError, match="unknown name 'oracle'; known are look_ahead, token_table, transitions, path"):
        make_engine(predictors=("oracle",))

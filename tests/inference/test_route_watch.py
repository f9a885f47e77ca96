"""What a request is told about the experts of its tokens, beside what the model and the cache say."""

import pytest
import torch

from raymoe.inference import SamplingParams
from tests.inference.conftest import generate_alone
from tests.inference.test_engine import Inbox

PROMPT = [7]


def routes_of(engine, prompt=PROMPT, **asked):
    inbox = Inbox()
    engine.submit(prompt, SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=(), **asked), inbox)
    deltas = [inbox.next()]
    while inbox.reason is None:
        deltas.append(inbox.next())
    return deltas, [route for delta in deltas for route in delta.routes or []]


@pytest.mark.parametrize("budget", ["100%", "40%"])
def test_routes_are_the_models_and_outcomes_the_caches(saved_model, make_engine, budget):
    model, _ = saved_model("olmoe")
    engine = make_engine("olmoe", expert_memory=budget, predictors=(), expert_readers=0)
    before = engine.stats()
    deltas, routes = routes_of(engine, routes=True)
    tokens = [token for delta in deltas for token in delta.tokens]
    assert [route.token for route in routes] == tokens == generate_alone(model, PROMPT, 8)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens[:-1]]), output_router_logits=True).router_logits
    for at, route in enumerate(routes):
        told = [[expert for expert, _ in layer] for layer in route.layers]
        truth = [layer[at].topk(len(told[0])).indices.tolist() for layer in logits]
        assert [sorted(layer) for layer in told] == [sorted(layer) for layer in truth]
    # one row a step: what it asked for is what the cache was asked for
    after = engine.stats()
    outcomes = [outcome for route in routes for layer in route.layers for _, outcome in layer]
    assert outcomes.count("hit") == after["hits"] - before["hits"]
    assert outcomes.count("fetched") == after["misses"] + after["late"] - before["misses"] - before["late"] > 0
    assert sum(map(sum, engine.expert_load())) == len(outcomes)


def test_who_does_not_ask_is_told_nothing(make_engine):
    engine = make_engine("olmoe")
    deltas, routes = routes_of(engine)
    assert routes == []
    assert all(delta.routes is None for delta in deltas)
    # of a prompt of many rows, the row that gives the token
    assert len(routes_of(engine, prompt=[5, 6, 7, 8, 9], routes=True)[1]) == 8
    assert engine._route_watch._asking == set()

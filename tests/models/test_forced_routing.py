"""A forced choice reaches the experts, keeps the family's own weights, and the choosers keep their word."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.models.forced_routing import balanced, counts, force_routing, hot
from raymoe.models.record import RoutingRecorder
from tests.tiny_models import FAMILIES, tiny_model, tiny_switch

FORCED = [family for family in FAMILIES if family != "phimoe"]


def gradient_of(module: torch.nn.Module, name: str) -> torch.Tensor:
    gradient = module.get_parameter(name).grad
    assert gradient is not None
    return gradient


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "changes", [{}, {"norm_topk_prob": True}, {"norm_topk_prob": False}], ids=["own", "norm", "not"]
)
@pytest.mark.parametrize("family", FORCED)
def test_forcing_the_routers_own_choice_changes_nothing(family, changes):
    model = tiny_model(family, **changes)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        expected = model(ids(2, 9)).logits
        own = recorder.take()
    with torch.no_grad(), force_routing(model, lambda layer, _call, _tokens: own[layer]):
        logits = model(ids(2, 9)).logits
    # the same formula, its products taken in another order
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FORCED)
def test_the_choice_reaches_the_experts_and_the_router_still_learns(family):
    model = tiny_model(family)
    calls = []

    def choose(layer, call, num_tokens):
        calls.append((layer, call, num_tokens))
        return hot(6, 2, [5, 1, 2])(layer, call, num_tokens)

    with RoutingRecorder(model) as recorder, force_routing(model, choose) as layers:
        for tokens in (ids(2, 9), ids(1, 4)):
            logits = model(tokens).logits
        taken = recorder.take()
    logits.square().sum().backward()
    expected = [[(5, 1, 2)[(token * 2 + k) % 3] for k in range(2)] for token in range(18)]
    for layer, index in zip(layers, taken, strict=True):
        assert index[:18].tolist() == expected
        assert gradient_of(layer.router, "weight").abs().sum() > 0
    assert calls == [(layer.index, call, tokens) for call, tokens in ((0, 18), (1, 4)) for layer in layers]
    assert not any(layer.router._forward_hooks for layer in layers)


def test_an_error_inside_frees_the_routers():
    model = tiny_model("olmoe")

    def fail():
        with force_routing(model, balanced(8, 2)):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    with RoutingRecorder(model) as recorder:
        model(ids(1, 8))
    assert recorder.take()[0].tolist() != balanced(8, 2)(0, 0, 8).tolist()


@pytest.mark.parametrize("model", [tiny_model("phimoe"), tiny_switch()], ids=["phimoe", "switch"])
def test_other_families_are_refused_by_name(model):
    with pytest.raises(ValueError, match=f"'{model.config.model_type}': its routers' choice cannot be forced; mixtral"):
        force_routing(model, balanced(6, 2)).__enter__()


def test_a_choice_of_another_shape_is_named():
    model = tiny_model("olmoe")
    with (
        force_routing(model, balanced(8, 3)),
        pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: the forced .* \[4, 3\]; int64 \[4, 2\] is"),
    ):
        model(ids(1, 4))


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 40))
def test_balanced_is_even_and_distinct(top_k, more_experts, num_tokens):
    num_experts = top_k + more_experts
    chosen = balanced(num_experts, top_k)(0, 0, num_tokens)
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    rows = [sum(row.count(expert) for row in chosen.tolist()) for expert in range(num_experts)]
    assert sum(rows) == num_tokens * top_k
    assert max(rows) - min(rows) <= 1


def oracle(loads: list[int], num_tokens: int, top_k: int) -> list[int]:
    """Water filling with whole numbers, one full expert after another."""
    full: set[int] = set()
    while True:
        left = num_tokens * (top_k - len(full))
        rest = [expert for expert in range(len(loads)) if expert not in full]
        weights = {expert: loads[expert] for expert in rest}
        if not sum(weights.values()):
            weights = dict.fromkeys(rest, 1)
        total = max(sum(weights.values()), 1)
        share = {expert: weight * left // total for expert, weight in weights.items()}
        by_remainder = sorted(rest, key=lambda expert: (-(weights[expert] * left % total), expert))
        for expert in by_remainder[: left - sum(share.values())]:
            share[expert] += 1
        over = {expert for expert in rest if share[expert] > num_tokens}
        if not over:
            return [num_tokens if expert in full else share[expert] for expert in range(len(loads))]
        full |= over


@settings(deadline=None)
@given(st.data())
def test_counts_are_in_proportion_and_distinct(data):
    num_experts = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, num_experts))
    num_tokens = data.draw(st.integers(0, 50))
    load = st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 10**9))
    loads = data.draw(st.lists(st.lists(load, min_size=num_experts, max_size=num_experts), min_size=1, max_size=3))
    choose = counts(loads, top_k)
    for layer, layer_loads in enumerate(loads):
        chosen = choose(layer, 0, num_tokens)
        assert chosen.shape == (num_tokens, top_k)
        assert all(len(set(row)) == top_k for row in chosen.tolist())
        rows = [sum(row.count(expert) for row in chosen.tolist()) for expert in range(num_experts)]
        assert rows == oracle(layer_loads, num_tokens, top_k)


def test_counts_are_the_loads_where_they_fit_and_shuffled_by_seed():
    loads = [[30, 5, 0, 25], [15, 15, 15, 15]]
    choose = counts(loads, 2, seed=3)
    for layer in range(2):
        assert choose(layer, 0, 30).flatten().bincount(minlength=4).tolist() == loads[layer]
    assert torch.equal(choose(0, 0, 30), counts(loads, 2, seed=3)(0, 7, 30))
    assert not torch.equal(choose(0, 0, 30), counts(loads, 2, seed=4)(0, 0, 30))


@pytest.mark.parametrize(("make", "text"), [
    (lambda: hot(8, 2, [3]), "experts: got 1; a token takes 2"),
    (lambda: hot(8, 2, [3, 3]), r"got \[3, 3\]; they must be different"),
    (lambda: hot(8, 2, [3, 8]), r"in \[0, 8\)"),
    (lambda: balanced(2, 3), "experts: got 2; a token takes 3"),
    (lambda: counts(torch.tensor([[1.5, 2.0]]), 1), "give integers"),
    (lambda: counts([[1, -2]], 1), "got -2; a load is at least 0"),
    (lambda: counts([[1, 2]], 3), "2 experts; a token takes 3"),
    (lambda: counts([[1, 2]], 1)(1, 0, 5), "loads: 1 layers, but the model has a layer 1"),
])  # fmt: skip
def test_what_cannot_be_chosen_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()

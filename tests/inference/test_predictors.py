"""Look-ahead, transition table and token table against slow, obvious oracles and on streams whose answer is known."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.inference.predictors import GateLookAhead, TokenTable, TransitionTable
from raymoe.inference.predictors.base import (
    MAX_ROWS,
    RankCalibration,
    chosen_mask,
    num_ranks,
    sampled_rows,
    union,
)
from raymoe.models import moe_layers
from tests.tiny_models import FAMILIES, tiny_model, tiny_switch


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6),
    st.sampled_from([1.0, 2.0, 5.0]),
)
def test_union_is_that_of_independent_tokens(rows, share):
    expected = [1 - np.prod([1 - row[e] for row in rows]) ** share for e in range(3)]
    assert union(torch.tensor(rows), share).tolist() == pytest.approx(expected, abs=1e-5)


@given(st.integers(0, 300))
def test_sampled_rows_are_distinct_and_in_range(count):
    rows = sampled_rows(count).tolist()
    assert len(set(rows)) == len(rows) == min(count, MAX_ROWS)
    assert all(0 <= row < count for row in rows)


def test_chosen_mask_leaves_out_no_expert():
    mask = chosen_mask(torch.tensor([[0, 3], [3, 3], [2, 1]]), 3)
    assert mask.tolist() == [[True, False, False], [False, False, False], [False, True, True]]


def test_calibration_finds_the_hit_rate_of_every_rank():
    generator = torch.Generator().manual_seed(0)
    num_experts, rates = 10, torch.tensor([0.9, 0.5, 0.3, 0.05])
    calibration = RankCalibration(num_experts, 2, 4, half_life=1e9)
    rest = 0.02
    for _ in range(300):
        order = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(20)])
        by_rank = torch.cat([rates, torch.full((num_experts - 4,), rest)])
        hit = torch.rand(20, num_experts, generator=generator) < by_rank
        chosen = torch.zeros(20, num_experts, dtype=torch.bool).scatter_(1, order, hit)
        calibration.learn(order[:, :4], chosen)
    assert calibration.by_rank().tolist() == pytest.approx([*rates.tolist(), rest], abs=0.02)
    probability = calibration.probability(order[:1, :4])[0]
    assert probability[order[0]].tolist() == pytest.approx([*rates.tolist(), *[rest] * 6], abs=0.02)


def test_calibration_forgets_what_no_longer_holds():
    calibration = RankCalibration(4, 1, 4, half_life=50.0)
    order = torch.arange(4).expand(10, 4)
    for expert in (0, 3):
        for _ in range(100):
            calibration.learn(order, chosen_mask(torch.full((10, 1), expert), 4))
    assert calibration.by_rank()[3] > 0.9
    assert calibration.by_rank()[0] < 0.05


def test_knowing_nothing_every_expert_is_alike():
    probability = RankCalibration(16, 2, num_ranks(16, 2)).probability(torch.arange(8)[None])
    assert probability.flatten().tolist() == pytest.approx([2 / 16] * 16)


def routed_inputs(model, call) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(hidden, expert_index) of every MoE layer in one forward pass."""
    taken = {}
    layers = moe_layers(model)
    hooks = [
        layer.experts.register_forward_pre_hook(
            lambda _, arguments, index=layer.index: taken.update({index: [part.clone() for part in arguments[:2]]})
        )
        for layer in layers
    ]
    with torch.no_grad():
        call(model)
    for hook in hooks:
        hook.remove()
    return [taken[layer.index] for layer in layers]


def decode_once(model):
    model(torch.tensor([[5, 9, 2, 40, 77]]), use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_look_ahead_is_exact_where_nothing_happens_between_layers(family):
    # with attention and experts that add nothing, the next router sees just what it is foretold, through its own norm
    more = {"layer_types": ["full_attention"] * 3} if family == "gpt_oss" else {}
    model = tiny_model(family, num_hidden_layers=3, **more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name and name.endswith("weight"):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            if "o_proj" in name or "experts" in name or "shared" in name:
                parameter.zero_()
    layers = moe_layers(model)
    seen = routed_inputs(model, decode_once)
    look_ahead = GateLookAhead(layers, depth=2, trial_tokens=5)
    for _ in range(4):
        look_ahead.step_begins(torch.zeros(5, dtype=torch.int64), ["a"] * 5)
        for layer, (hidden, index) in zip(layers, seen, strict=True):
            look_ahead.routed(layer.index, hidden, index)
    rows = look_ahead.report()
    assert len(rows) == {2: 1, 3: 3}[len(layers)]
    for row in rows:
        assert row["recall renormed"] == pytest.approx(1.0)
        assert row["view"] == "renormed" or row["recall as it is"] == pytest.approx(1.0)


def test_look_ahead_of_switch_asks_its_routers():
    model = tiny_switch()
    layers = moe_layers(model)
    ids = torch.tensor([[5, 9, 2, 40, 77, 1]])
    taken = [[] for _ in layers]
    hooks = [
        layer.router.register_forward_hook(
            lambda _, inputs, out, index=layer.index: taken[index].append((inputs[0], out))
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids[:, :4])
    for hook in hooks:
        hook.remove()
    look_ahead = GateLookAhead(layers, depth=1)
    hidden, out = taken[2][0]
    chosen = out[0].flatten(0, 1).int().argmax(-1, keepdim=True)
    found = look_ahead.routed(2, hidden.flatten(0, 1), chosen)
    assert list(found) == [3]
    assert found[3].shape == (5,)


def test_look_ahead_keeps_what_is_measured_better_and_drops_what_is_useless():
    torch.manual_seed(0)
    model = tiny_model("olmoe", num_hidden_layers=4)
    layers = moe_layers(model)
    look_ahead = GateLookAhead(layers, depth=3, trial_tokens=64)
    answers = {}
    for step in range(60):
        look_ahead.step_begins(torch.zeros(4, dtype=torch.int64), list("abcd"))
        hidden = torch.randn(4, 32)
        for layer in layers:
            # layers 1 and 2 follow from the state; layer 3 is a coin that no router foretells
            logits = layer.router.forward(hidden)[0]
            index = logits.topk(2).indices if layer.index < 3 else torch.rand(4, 8).topk(2).indices
            answers[step, layer.index] = look_ahead.routed(layer.index, hidden, index)
    rows = {(row["layer"], row["distance"]): row for row in look_ahead.report()}
    assert all(rows[layer, distance]["in_use"] for layer, distance in ((1, 1), (2, 1), (2, 2)))
    assert rows[2, 2]["recall as it is"] > 0.99
    assert not any(rows[3, distance]["in_use"] for distance in (1, 2, 3))
    assert set(answers[0, 0]) == {1, 2, 3}
    assert set(answers[59, 0]) == {1, 2}
    assert answers[59, 2] == {}
    # and what it says is what comes
    truth = chosen_mask(layers[1].router.forward(hidden)[0].topk(2).indices, 8).any(0)
    assert (answers[59, 0][1][truth] > 0.9).all()
    assert (answers[59, 0][1][~truth] < 0.3).all()


def test_look_ahead_leaves_the_model_alone():
    model = tiny_model("olmoe")
    before = copy.deepcopy(model.state_dict())
    calls = []
    hook = moe_layers(model)[1].router.register_forward_hook(lambda *_: calls.append(1))
    look_ahead = GateLookAhead(moe_layers(model))
    look_ahead.routed(0, torch.randn(300, 32), torch.randint(0, 9, (300, 2)))
    assert look_ahead.routed(0, torch.randn(0, 32), torch.zeros(0, 2, dtype=torch.int64)) == {}
    hook.remove()
    assert not calls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_look_ahead_refuses_no_depth():
    with pytest.raises(ValueError, match="depth = 0: look-ahead needs at least 1 layer"):
        GateLookAhead([], depth=0)


LAYERS, EXPERTS, K = 3, 12, 2


def cyclic_route(position: int, layer: int) -> list[int]:
    """The same request moves on by two experts a token, and by three a layer."""
    first = (2 * position + 3 * layer) % EXPERTS
    return [first, (first + 1) % EXPERTS]


def serve(table, positions: dict[str, int], steps: int) -> dict[int, dict]:
    """Decodes for all requests at once; the last step's answers by the layer that gave them, -1: `step_begins`."""
    answers = {}
    for _ in range(steps):
        names = list(positions)
        answers = {-1: table.step_begins(torch.zeros(len(names), dtype=torch.int64), names)}
        for layer in range(LAYERS):
            index = torch.tensor([cyclic_route(positions[name], layer) for name in names])
            answers[layer] = table.routed(layer, torch.zeros(len(names), 4), index)
        for name in names:
            positions[name] += 1
    return answers


def wanted(positions: dict[str, int], layer: int) -> set[int]:
    return {expert for position in positions.values() for expert in cyclic_route(position, layer)}


def likely(probability: torch.Tensor) -> set[int]:
    return set((probability > 0.5).nonzero().flatten().tolist())


@pytest.mark.parametrize("positions", [{"a": 0}, {"a": 0, "b": 3}, {"a": 1, "b": 2, "c": 5}])
def test_transitions_learn_a_cycle_across_layers_and_along_tokens(positions):
    table = TransitionTable(LAYERS, EXPERTS)
    answers = serve(table, positions, 150)
    last = {name: position - 1 for name, position in positions.items()}
    for layer in range(LAYERS):
        assert likely(answers[-1][layer]) == wanted(last, layer)
        assert likely(answers[layer][layer]) == wanted(positions, layer)
        if layer + 1 < LAYERS:
            assert likely(answers[layer][layer + 1]) == wanted(last, layer + 1)


def test_a_route_out_of_line_corrects_the_next_layer():
    table = TransitionTable(LAYERS, EXPERTS)
    serve(table, {"a": 0}, 300)
    told = table.step_begins(torch.zeros(1, dtype=torch.int64), ["a"])
    assert likely(told[1]) == wanted({"a": 300}, 1)
    # at layer 0 the token turns out to be where position 303 would be
    corrected = table.routed(0, torch.zeros(1, 4), torch.tensor([cyclic_route(303, 0)]))
    assert corrected[1][list(wanted({"a": 303}, 1))].min() > told[1][list(wanted({"a": 303}, 1))].max()


def test_what_is_forgotten_is_not_known():
    table = TransitionTable(LAYERS, EXPERTS, max_requests=2)
    serve(table, {"a": 0, "b": 5}, 20)
    table.forget("a")
    table.forget("never seen")
    assert table.step_begins(torch.zeros(1, dtype=torch.int64), ["a"]) == {}
    assert set(table.step_begins(torch.zeros(1, dtype=torch.int64), ["b"])) == {0, 1, 2}
    # a third request pushes out the one that was used longest ago, but none of its own step
    serve(table, {"b": 0, "c": 0}, 2)
    assert table.step_begins(torch.zeros(1, dtype=torch.int64), ["a"]) == {}
    held = table.nbytes()
    for number in range(50):
        serve(table, {f"r{number}": 0, f"s{number}": 1, f"t{number}": 2}, 1)
    assert table.nbytes() == held


def test_a_prompt_is_learnt_from_token_by_token():
    read, decoded = TransitionTable(LAYERS, EXPERTS), TransitionTable(LAYERS, EXPERTS)
    for start in range(0, 60, 20):
        read.step_begins(torch.zeros(20, dtype=torch.int64), ["a"] * 20)
        for layer in range(LAYERS):
            read.routed(layer, torch.zeros(20, 4), torch.tensor([cyclic_route(start + i, layer) for i in range(20)]))
    serve(decoded, {"a": 0}, 60)
    for one, other in zip(read._counts, decoded._counts, strict=True):
        assert torch.allclose(one, other, rtol=1e-2)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9), min_size=1, max_size=8),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 10**6),
)
def test_any_stream_gives_probabilities(steps, top_k, max_requests, seed):
    generator = torch.Generator().manual_seed(seed)
    tables = [TransitionTable(2, 5, max_requests=max_requests), TokenTable(2, 5, num_slots=7)]
    for names in steps:
        names = sorted(names)
        ids = torch.randint(0, 50, (len(names),), generator=generator)
        for table in tables:
            answers = [table.step_begins(ids, names)]
            for layer in range(2):
                # 5 is no expert
                index = torch.rand(len(names), 6, generator=generator).topk(top_k).indices
                answers.append(table.routed(layer, torch.zeros(len(names), 3), index))
            for answer in answers:
                for layer, probability in answer.items():
                    assert 0 <= layer < 2
                    assert probability.shape == (5,)
                    assert ((probability >= 0) & (probability <= 1)).all()
        for table in tables:
            table.forget(names[0])


def test_token_table_knows_the_tokens_that_came_before():
    table = TokenTable(LAYERS, EXPERTS, num_slots=64)
    generator = torch.Generator().manual_seed(0)
    # a token's path is its own, but for one choice in ten
    paths = torch.stack([torch.randperm(EXPERTS, generator=generator)[:K] for _ in range(40 * LAYERS)]).view(
        40, LAYERS, K
    )
    hits, named = 0, 0
    for step in range(400):
        ids = torch.randint(0, 40, (3,), generator=generator)
        told = table.step_begins(ids, ["a", "b", "c"])
        for layer in range(LAYERS):
            index = paths[ids, layer].clone()
            strays = torch.rand(3, generator=generator) < 0.1
            index[strays] = torch.randint(0, EXPERTS - 1, (int(strays.sum()), K), generator=generator)
            table.routed(layer, torch.zeros(3, 4), index)
            if step > 200:
                truth = chosen_mask(index, EXPERTS).any(0)
                hits += int((truth & (told[layer] > 0.5)).sum())
                named += int((told[layer] > 0.5).sum())
    assert hits / named > 0.75
    assert table.step_begins(torch.tensor([999]), ["a"]) == {}


@pytest.mark.parametrize("kind", [TransitionTable, TokenTable])
def test_inference_mode_may_change_between_steps(kind):
    table, plain = kind(LAYERS, EXPERTS), kind(LAYERS, EXPERTS)
    positions, others = {"a": 0, "b": 4}, {"a": 0, "b": 4}
    for number in range(4):
        with torch.inference_mode(number % 2 == 0):
            answers = serve(table, positions, 3)
        expected = serve(plain, others, 3)
        for place, found in answers.items():
            for layer, probability in found.items():
                assert torch.equal(probability, expected[place][layer])
    table.forget("a")
    with torch.inference_mode():
        table.forget("b")


@pytest.mark.parametrize("field", ["num_layers", "num_experts"])
@pytest.mark.parametrize("kind", [TransitionTable, TokenTable])
def test_tables_refuse_sizes_below_one(kind, field):
    with pytest.raises(ValueError, match=f"{field} = 0: must be at least 1"):
        kind(**({"num_layers": 2, "num_experts": 4} | {field: 0}))

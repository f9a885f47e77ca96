"""The recorder says what the routers said, for every family and whatever computes the experts."""

import numpy as np
import pytest
import torch

from raymoe.models import attach_runtime
from raymoe.models.record import RoutingRecorder
from tests.tiny_models import FAMILIES, tiny_model

# families whose logits transformers hands out with output_router_logits
WITH_LOGITS = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss")


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(5))


def recorded(model, tokens: torch.Tensor) -> list[list[list[int]]]:
    """Sorted experts of every token, as lists [L][T][K]."""
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(tokens)
    return [chosen.sort(dim=-1).values.tolist() for chosen in recorder.take()]


def largest(scores: torch.Tensor, choices: int) -> list[list[int]]:
    """The slow way: sort each token's scores, take the first."""
    return [sorted(np.argsort(-row, kind="stable")[:choices].tolist()) for row in scores.numpy()]


@pytest.mark.parametrize("implementation", ["eager", "raymoe"])
@pytest.mark.parametrize("family", WITH_LOGITS)
def test_equals_the_router_logits(family, implementation):
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        logits = model(ids(3, 17), output_router_logits=True).router_logits
    assert recorded(model, ids(3, 17)) == [largest(layer.reshape(51, -1), 2) for layer in logits]


def test_equals_the_group_limited_choice_of_deepseek_v3():
    model = tiny_model("deepseek_v3")
    router = model.model.layers[1].mlp.gate
    seen = []
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        hook = router.register_forward_hook(lambda module, inputs, outputs: seen.append(inputs[0].reshape(-1, 32)))
        model(ids(2, 40))
        hook.remove()
        scores = torch.sigmoid(seen[0] @ router.weight.T) + router.e_score_correction_bias
    (chosen,) = recorder.take()
    plain = 0
    for token, row in zip(chosen.tolist(), scores.tolist(), strict=True):
        # two groups of four, ranked by the sum of their two best; the token takes the best two of the better group
        groups = [row[:4], row[4:]]
        best = max((0, 1), key=lambda group: sum(sorted(groups[group])[-2:]))
        expected = sorted(range(4), key=lambda expert: -groups[best][expert])[:2]
        assert sorted(token) == sorted(4 * best + expert for expert in expected)
        plain += sorted(token) == sorted(np.argsort(row)[-2:].tolist())
    # the limit must have mattered somewhere, or this shows nothing
    assert plain < 80


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_token_of_every_family(family):
    model = tiny_model(family)
    with RoutingRecorder(model) as recorder, torch.inference_mode():
        model(ids(2, 9))
        model(ids(1, 5))
        chosen = recorder.take()
        assert [tuple(index.shape) for index in chosen] == [(23, layer.top_k) for layer in recorder.layers]
        model(ids(2, 9))
        counts = recorder.take_counts()
        assert recorder.take_counts().sum() == 0
    for layer, index, count_E in zip(recorder.layers, chosen, counts, strict=True):
        assert all(len(set(token)) == layer.top_k for token in index.tolist())
        assert count_E.shape == (layer.num_experts,)
        assert count_E.tolist() == [int((index[:18] == expert).sum()) for expert in range(layer.num_experts)]
        assert count_E.sum() == 18 * layer.top_k


def test_records_in_front_of_a_runtime_and_changes_nothing():
    model = tiny_model("olmoe")
    tokens = ids(2, 9)
    with torch.no_grad():
        expected = model(tokens).logits
        with RoutingRecorder(model):
            assert torch.equal(model(tokens).logits, expected)
    calls = []
    attach_runtime(model, lambda layer, hidden, index, weight: (calls.append(index), torch.zeros_like(hidden))[1])
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(tokens)
    assert all(torch.equal(*pair) for pair in zip(recorder.take(), calls, strict=True))


def test_records_only_while_entered():
    model = tiny_model("mixtral")
    recorder = RoutingRecorder(model)
    with torch.no_grad():
        model(ids(1, 4))
        with recorder:
            model(ids(1, 4))
        model(ids(1, 4))
    assert [len(index) for index in recorder.take()] == [4, 4]
    assert not any(layer.experts._forward_pre_hooks for layer in recorder.layers)


def test_an_index_of_e_is_no_expert():
    model = tiny_model("mixtral")
    with RoutingRecorder(model) as recorder, torch.no_grad():
        for layer in recorder.layers:
            layer.experts(torch.zeros(2, 32), torch.tensor([[0, 6], [6, 5]]), torch.ones(2, 2))
    assert recorder.take_counts().tolist() == [[1, 0, 0, 0, 0, 1]] * 2

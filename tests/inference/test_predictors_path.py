"""The path predictor: served token by token it says what the whole network says, it learns, and a wrong pairing is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from raymoe.inference.predictors import PathPredictor
from raymoe.inference.predictors.path_model import (
    FACTS_FILE,
    WEIGHTS_FILE,
    PathNetwork,
    PathShape,
    load_path_network,
    save_path_network,
)
from raymoe.inference.predictors.path_training import (
    RecordedRoutes,
    evaluate_most_frequent,
    evaluate_path_network,
    path_loss,
    train_path_network,
)

SIZES: dict[str, Any] = {"num_layers": 3, "num_experts": 5, "top_k": 2, "vocab_size": 40}
SMALL = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_heads": 3, "num_blocks": 2, "prompt_tokens": 6, "window": 5}


@pytest.fixture(scope="module")
def network() -> PathNetwork:
    torch.manual_seed(0)
    network = PathNetwork(PathShape(**SIZES, vocabulary="", **SMALL)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            # T5 starts with norms of one and small biases: spread, so that a forgotten one shows
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return network


def feed(predictor: PathPredictor, rows: list[tuple[str, list[int]]]) -> torch.Tensor | None:
    """One step with these requests' tokens."""
    return predictor.paths(
        torch.tensor([token for _, ids in rows for token in ids]), [name for name, ids in rows for _ in ids]
    )


@torch.no_grad()
def whole(network: PathNetwork, prompt: list[int], decoded: list[int]) -> torch.Tensor:
    """float32 [S, L, E]: all decoded tokens at once, through transformers' own T5."""
    return network(torch.tensor([prompt]), torch.tensor([decoded]))[0].sigmoid()


def test_token_by_token_is_the_whole_network(network):
    predictor = PathPredictor(network)
    prompts = {"a": [3, 9, 21], "b": [7], "c": [1, 2, 3, 4, 5, 6]}
    decoded = {"a": [11, 12, 13, 14], "b": [15, 16, 17], "c": [30, 31]}
    assert feed(predictor, list(prompts.items())) is None
    expected = {name: whole(network, prompts[name], decoded[name]) for name in prompts}
    # requests come at different times and in changing company
    for names in (["a"], ["b", "a"], ["c", "a", "b"], ["b", "c", "a"]):
        said = feed(predictor, [(name, [decoded[name].pop(0)]) for name in names])
        assert said is not None
        for row, name in zip(said, names, strict=True):
            assert torch.allclose(row, expected[name][0], atol=1e-5)
            expected[name] = expected[name][1:]
    assert all(not rows.numel() for rows in expected.values())


def test_long_past_slides_out_of_the_window(network):
    # of a one-block decoder the state at a position does not depend on those before it, so the window is exact
    torch.manual_seed(1)
    network = PathNetwork(PathShape(**SIZES, vocabulary="", **(SMALL | {"num_blocks": 1}))).eval()
    predictor = PathPredictor(network)
    prompt, decoded = list(range(10)), list(range(20, 33))
    feed(predictor, [("a", prompt)])
    for end in range(1, len(decoded) + 1):
        said = feed(predictor, [("a", [decoded[end - 1]])])
        assert said is not None
        expected = whole(network, prompt[-6:], decoded[max(0, end - 5) : end])[-1]
        assert torch.allclose(said[0], expected, atol=1e-5)


def test_prompts_in_pieces_and_requests_read_again(network):
    predictor = PathPredictor(network)
    feed(predictor, [("a", [3, 9])])
    feed(predictor, [("a", [21, 5]), ("b", [8, 8])])
    said = feed(predictor, [("a", [11])])
    assert said is not None
    assert torch.allclose(said[0], whole(network, [3, 9, 21, 5], [11])[0], atol=1e-5)
    # pushed out of the KV cache: prompt and answer come once more, as a prompt
    assert feed(predictor, [("a", [3, 9, 21, 5, 11])]) is None
    said = feed(predictor, [("a", [12]), ("b", [13])])
    assert said is not None
    assert torch.allclose(said[0], whole(network, [3, 9, 21, 5, 11], [12])[0], atol=1e-5)
    assert torch.allclose(said[1], whole(network, [8, 8], [13])[0], atol=1e-5)


def test_slots_are_bounded_and_given_back(network):
    predictor = PathPredictor(network, max_requests=2)
    names = ["a", "b", "c"]
    feed(predictor, [(name, [1, 2]) for name in names])
    said = feed(predictor, [(name, [3]) for name in names])
    assert said is not None
    assert len(said) == 2
    held = predictor.nbytes()
    predictor.forget("a")
    predictor.forget("never seen")
    said = feed(predictor, [("c", [4])])
    assert said is not None
    # nothing of "a" is left in its slot
    assert torch.allclose(said[0], whole(network, [1, 2], [4])[0], atol=1e-5)
    assert predictor.nbytes() == held


def test_inference_mode_may_change_between_steps(network):
    predictor = PathPredictor(network)
    for number, ids in enumerate(([3, 9], [11], [12], [13])):
        with torch.inference_mode(number % 2 == 0):
            said = feed(predictor, [("a", ids), *([("b", [1, 2])] if number == 1 else [])])
    assert said is not None
    assert torch.allclose(said[0], whole(network, [3, 9], [11, 12, 13])[-1], atol=1e-5)


def test_a_step_is_the_union_of_its_decoding_tokens(network):
    one, other = PathPredictor(network), PathPredictor(network)
    for predictor in (one, other):
        feed(predictor, [("a", [1, 2]), ("b", [5])])
    rows = [("a", [3]), ("b", [4]), ("new", [6, 7, 8])]
    paths = feed(one, rows)
    assert paths is not None
    said = other.step_begins(torch.tensor([3, 4, 6, 7, 8]), ["a", "b", "new", "new", "new"])
    assert said.keys() == {0, 1, 2}
    for layer, probability in said.items():
        assert torch.allclose(probability, 1 - (1 - paths[:, layer]).prod(0), atol=1e-5)
    assert other.routed(0, torch.zeros(5, 4), torch.zeros(5, 2, dtype=torch.int64)) == {}
    assert other.step_begins(torch.tensor([9, 9]), ["newer", "newer"]) == {}


def test_loss_is_that_of_the_definition():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, 4)
    experts = torch.randint(0, 4, (2, 3, 2, 2))
    experts[0, 1] = 4
    experts[1, 0, 1, 0] = 4
    each = []
    for b in range(2):
        for s in range(3):
            for layer in range(2):
                taken = set(experts[b, s, layer].tolist()) - {4}
                if taken:
                    label = torch.tensor([float(e in taken) for e in range(4)])
                    p = logits[b, s, layer].sigmoid()
                    each.append(-(label * p.log() + (1 - label) * (1 - p).log()).sum())
    assert path_loss(logits, experts).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    assert path_loss(logits, torch.full_like(experts, 4)).item() == 0.0


def routes_by_token(num_sequences: int, num_tokens: int) -> RecordedRoutes:
    """Layer 0 follows from the token, layer 1 from the token before it, layer 2 from nothing but the layer."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (num_sequences, num_tokens), generator=generator)
    experts = torch.zeros(num_sequences, num_tokens, 3, 2, dtype=torch.int16)
    for layer, known in enumerate((tokens, tokens.roll(1, 1), torch.zeros_like(tokens))):
        experts[:, :, layer, 0] = known % 5
        experts[:, :, layer, 1] = (known + 1) % 5
    return RecordedRoutes(tokens, experts)


def test_it_learns_what_follows_from_the_tokens():
    train, held = routes_by_token(200, 16).split()
    assert (len(train.tokens), len(held.tokens)) == (180, 20)
    shape = PathShape(**SIZES, vocabulary="", **(SMALL | {"d_model": 16, "d_kv": 8, "window": 16, "num_blocks": 1}))
    losses = []
    network = train_path_network(
        train, shape, steps=220, batch=32, learning_rate=0.1, on_step=lambda _, loss: losses.append(loss)
    )
    assert len(losses) == 220
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    one, four = evaluate_path_network(network, held, expert_bytes=[1, 1, 1])
    base, _ = evaluate_most_frequent(train, held, shape, expert_bytes=[1, 1, 1])
    assert (one["tokens"], one["wanted"], four["tokens"]) == (1, 2.0, 4)
    assert one["recall@k"] > base["recall@k"] + 0.15
    assert one["recall@2k"] >= one["recall@1.5k"] >= one["recall@k"] == one["precision@k"]
    assert one["byte_recall@k"] == pytest.approx(one["recall@k"])
    # only the bytes of layer 2 count, and that one is easy
    assert evaluate_path_network(network, held, expert_bytes=[0, 0, 1])[0]["byte_recall@k"] > 0.99


def test_training_needs_something_to_learn_from():
    tokens = torch.zeros(4, 1, dtype=torch.int64)
    shape = PathShape(**SIZES, vocabulary="", **SMALL)
    with pytest.raises(ValueError, match=r"sequences of 1 token\(s\): a prompt and an answer need at least 2"):
        train_path_network(RecordedRoutes(tokens, torch.zeros(4, 1, 3, 2)), shape, steps=1, batch=1, learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"1 sequence\(s\): training needs at least 2"):
        RecordedRoutes(tokens[:1], torch.zeros(1, 1, 3, 2)).split()
    with pytest.raises(ValueError, match=r"must be \[N, n, L, K\]"):
        RecordedRoutes(tokens, torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match=r"learning_rate = 1e\+30: the loss is (nan|inf)"):
        train_path_network(routes_by_token(8, 6), shape, steps=9, batch=2, learning_rate=1e30)


def test_what_is_stored_is_what_is_loaded(network, tmp_path):
    assert PathPredictor.beside(tmp_path, **SIZES) is None
    save_path_network(network, tmp_path, {"steps": 3})
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS_FILE, FACTS_FILE}
    loaded = load_path_network(tmp_path, **SIZES)
    assert loaded is not None
    assert loaded.shape == network.shape
    said, expected = whole(loaded, [1, 2, 3], [4, 5]), whole(network, [1, 2, 3], [4, 5])
    # bfloat16 on disk
    assert F.l1_loss(said, expected) < 0.02
    assert PathPredictor.beside(tmp_path, **SIZES) is not None


@pytest.mark.parametrize("field", SIZES)
def test_another_model_is_refused_by_name(network, tmp_path, field):
    save_path_network(network, tmp_path, {})
    other = SIZES | {field: SIZES[field] + 1}
    with pytest.raises(ValueError, match=f"{field} is {SIZES[field]}, but the model's is {other[field]}"):
        load_path_network(tmp_path, **other)


def test_damage_is_named(network, tmp_path):
    def refused() -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers look at what it says)
            load_path_network(tmp_path, **SIZES)
        return str(caught.value)

    def rewritten(**changes: Any) -> str:
        facts_file.write_text(json.dumps(facts | changes))
        said = refused()
        facts_file.write_text(json.dumps(facts))
        return said

    save_path_network(network, tmp_path, {})
    facts_file, weights_file = tmp_path / FACTS_FILE, tmp_path / WEIGHTS_FILE
    facts = json.loads(facts_file.read_text())
    assert "version is 7, this raymoe reads 1" in rewritten(version=7)
    assert "shape must have exactly the fields" in rewritten(shape={})
    assert "shape.window is 0" in rewritten(shape=facts["shape"] | {"window": 0})
    assert "shape.d_model is '8'" in rewritten(shape=facts["shape"] | {"d_model": "8"})
    assert "does not hold what path_predictor.json says" in rewritten(shape=facts["shape"] | {"d_ff": 17})
    content = weights_file.read_bytes()
    weights_file.write_bytes(content[:-1] + b"?")
    assert "damaged, or of another run" in refused()
    tensors = load_file(weights_file)
    tensors.pop("head.weight")
    save_file(tensors, weights_file)
    import hashlib

    digest = hashlib.blake2b(weights_file.read_bytes(), digest_size=16).hexdigest()
    assert "1 tensors are missing, the first is 'head.weight'" in rewritten(weights=digest)
    weights_file.unlink()
    assert f"{WEIGHTS_FILE} is missing" in refused()
    facts_file.write_text("{")
    assert "not a path predictor's description" in refused()


def test_a_failed_write_leaves_nothing(network, tmp_path, monkeypatch):
    def fail(self: Path, content: bytes) -> int:
        open(self, "wb").close()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        save_path_network(network, tmp_path, {})
    assert not list(tmp_path.iterdir())

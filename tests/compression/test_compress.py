"""Compression on models of every family: what is exact is exact."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from raymoe import compression
from raymoe.compression.attach import state_of
from raymoe.compression.split import split
from tests.tiny_models import FAMILIES, tiny_model, tiny_switch

TOKENS = torch.randint(2, 96, (4, 12), generator=torch.Generator().manual_seed(3))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def wide(family: str, **changes):
    return tiny_model(family, num_experts_per_tok=4, **changes)


def stir(model, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in compression.theta_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "phimoe"])
def test_ones_equal_dropping_and_restore_is_lossless(family):
    model = wide(family)
    model.set_experts_implementation("raymoe")
    full = logits(model)
    compression.compress(model, keep=0.5)
    assert all((p == 1).all() and p.dtype == torch.float32 for p in compression.theta_parameters(model).values())
    ones = logits(model)
    assert not torch.equal(ones, full)
    with compression.as_dropped(model):
        assert torch.equal(logits(model), ones)
    with compression.as_full(model):
        assert torch.equal(logits(model), full)
    stir(model)
    assert not torch.equal(logits(model), ones)
    state = dict(compression.restore(model).state_dict())
    assert not any("compressed" in name for name in state)
    assert torch.equal(logits(model), full)
    assert torch.equal(logits(compression.compress(model, keep=2, method="drop")), ones)


@pytest.mark.parametrize("keep", [4, 1.0, [4, 1.0]])
@pytest.mark.parametrize(
    "method", ["compressed_experts", "drop", "drop_renormalised", "mean_vector", "reap", "magnitude"]
)
def test_keeping_all_is_the_identity(method, keep):
    model = wide("olmoe")
    model.set_experts_implementation("raymoe")
    full = logits(model)
    compression.compress(model, keep=keep, method=method, calibration=TOKENS)
    stir(model)
    assert torch.equal(logits(model), full)


def test_phimoe_ranks_by_its_router_and_its_experts_may_be_wider_than_the_model():
    model = tiny_model("phimoe")
    assert model.config.intermediate_size > model.config.hidden_size
    compression.compress(model, keep=1)
    layer = next(iter(state_of(model).edits.values()))
    assert not layer.by_weight
    assert layer.vectors.inner.shape == (6, 48)
    assert layer.vectors.gate_in.shape == (6, 32)
    ones = logits(model)
    stir(model)
    assert not torch.equal(logits(model), ones)


@pytest.mark.parametrize("tie_input", [False, True])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_vectors_act_as_the_paper_writes(family, tie_input):
    """y = sum over main of a_i E_i(x * t1, x * t3; * t2), token by token."""
    model = wide(family)
    compression.compress(model, keep=2, tie_input=tie_input)
    stir(model)
    edit = next(iter(state_of(model).edits.values()))
    experts, vectors = edit.layer.experts, edit.vectors
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    index = torch.stack(
        [torch.randperm(edit.layer.num_experts, generator=torch.Generator().manual_seed(s))[:4] for s in range(5)]
    )
    weight = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)).sort(-1, descending=True).values
    with torch.no_grad():
        got = experts(hidden, index, weight)
    want = torch.zeros_like(hidden)
    for t in range(5):
        shares = weight[t, 2:] / weight[t, 2:].sum()
        up_in = vectors.gate_in if tie_input else vectors.up_in
        gate_in, up_in, inner = (
            sum(share * table[e] for share, e in zip(shares, index[t, 2:].tolist(), strict=True))
            for table in (vectors.gate_in, up_in, vectors.inner)
        )
        for e, w in zip(index[t, :2].tolist(), weight[t, :2], strict=True):
            up_weight, down = experts.gate_up_proj[e], experts.down_proj[e]
            up_weight, down = (up_weight.T, down.T) if experts.is_transposed else (up_weight, down)
            pre, other = up_weight @ (hidden[t] * gate_in), up_weight @ (hidden[t] * up_in)
            half = len(pre) // 2
            is_gate = torch.arange(len(pre)) < half if experts.is_concatenated else torch.arange(len(pre)) % 2 == 0
            pre = torch.where(is_gate, pre, other)
            pre = pre + experts.gate_up_proj_bias[e] if experts.has_bias else pre
            row = down @ (experts._apply_gate(pre[None])[0] * inner)
            want[t] += w * (row + experts.down_proj_bias[e] if experts.has_bias else row)
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def test_each_method_answers_differently():
    answers = {}
    for method in compression.METHODS:
        model = compression.compress(wide("olmoe"), keep=0.5, method=method, calibration=TOKENS)
        stir(model)
        answers[method] = logits(model)
    names = list(answers)
    assert not any(torch.equal(answers[a], answers[b]) for i, a in enumerate(names) for b in names[i + 1 :])


def test_split_with_any_number_of_experts():
    index = torch.tensor([[3, 0, 5, 1], [2, 5, 5, 5], [5, 4, 5, 1], [5, 5, 5, 5]])
    weight = torch.tensor([[0.1, 0.4, float("nan"), 0.2], [0.5, 0, 0, 0], [0, 0.1, 0, 0.3], [1.0, 1, 1, 1]])
    parts = split(index, weight, 5, 0.5)
    assert parts.main_index.tolist() == [[0, 1], [2, 5], [1, 5], [5, 5]]
    torch.testing.assert_close(parts.main_weight, torch.tensor([[0.4, 0.2], [0.5, 0], [0.3, 0], [0, 0]]))
    chosen = [
        [e for e, s in zip(*row, strict=True) if s > 0]
        for row in zip(parts.other_index.tolist(), parts.other_shares.tolist(), strict=True)
    ]
    assert chosen == [[3], [], [4], []]
    assert parts.other_shares.sum(-1).tolist() == [1, 0, 1, 0]
    by_count = split(index, weight, 5, 2)
    assert by_count.main_index.tolist() == [[0, 1], [2, 5], [1, 4], [5, 5]]
    assert by_count.other_index.tolist() == [[3, 5], [5, 5], [5, 5], [5, 5]]


def test_bad_settings_name_the_key():
    model = wide("olmoe")
    for keep in (0, 0.0, 1.5, -1, 5, [2], True):
        with pytest.raises(ValueError, match=r"^keep: "):
            compression.compress(model, keep=keep)
    with pytest.raises(ValueError, match=r"^method: 'fold' is not known"):
        compression.compress(model, method="fold")
    with pytest.raises(ValueError, match="give calibration"):
        compression.compress(model, method="reap")
    with pytest.raises(ValueError, match="take one expert"):
        compression.compress(tiny_switch())
    with pytest.raises(ValueError, match="not compressed"):
        compression.restore(model)
    compression.compress(model, method="drop")
    with pytest.raises(ValueError, match="compressed already"):
        compression.compress(model)
    with pytest.raises(ValueError, match=r"^train: method 'drop' has no vectors"):
        compression.fit(model, TOKENS)
    for key, value in (("train", "main"), ("loss", "mse")):
        with pytest.raises(ValueError, match=f"^{key}: '{value}' is not known"):
            compression.fit(model, TOKENS, **{key: value})


@pytest.mark.parametrize(
    ("family", "changes", "full", "halved"),
    [
        ("phimoe", {"hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "num_local_experts": 16,
                    "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32064},
         32 * 2 * 3 * 4096 * 6400, 32 * 3 * 4096 * 6400),
        ("olmoe", {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64,
                   "num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304},
         16 * 8 * 3 * 2048 * 1024, 16 * 4 * 3 * 2048 * 1024),
    ],
)  # fmt: skip
def test_active_parameters_of_the_papers_models(family, changes, full, halved):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**changes))
    counts = compression.active_counts(model)
    assert counts.active_moe_parameters == full
    settings = compression.CompressionSettings("compressed_experts", (0.5,) * changes["num_hidden_layers"])
    compressed = compression.active_counts(model, settings)
    assert compressed.active_moe_parameters == halved
    # 5.03 -> 2.52 B and 805 -> 403 M
    assert (round(full / 1e6), round(halved / 1e6)) == {"phimoe": (5033, 2517), "olmoe": (805, 403)}[family]
    assert compressed.total_parameters == counts.total_parameters + compressed.vector_parameters
    saved = 1 - compressed.active_parameters / counts.active_parameters
    # the paper says 31.4 % for OLMoE, and 33.8 % for Phi-3.5-MoE: as many parameters less, 2.52 B, but of 7.45 B where its
    # weights count 6.64 B
    assert round(100 * saved, 1) == {"phimoe": 37.9, "olmoe": 31.4}[family]
    assert round(counts.active_parameters / 1e7) == {"phimoe": 664, "olmoe": 128}[family]
    assert compressed.flops_per_token < counts.flops_per_token


def test_gradients_by_differences_and_what_the_router_learns():
    model = wide("olmoe").double()
    compression.compress(model, keep=2)
    stir(model)
    edit = next(iter(state_of(model).edits.values()))
    edit.vectors.double()
    hidden = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(8)[:4] for _ in range(3)])
    weight = torch.rand(3, 4, dtype=torch.float64).sort(-1, descending=True).values.requires_grad_()
    vectors = edit.vectors

    def layer(hidden, weight, *_):
        return edit.layer.experts(hidden, index, weight)

    assert torch.autograd.gradcheck(
        layer, (hidden, weight, vectors.gate_in, vectors.up_in, vectors.inner), fast_mode=True
    )

    def router_gradient(others: int, scale: float) -> float:
        with torch.no_grad():
            for table in (vectors.gate_in, vectors.up_in, vectors.inner):
                table.fill_(1).add_(scale * torch.randn_like(table))
        given = weight.detach()[:, : 2 + others].requires_grad_()
        out = edit.layer.experts(hidden.detach(), index[:, : 2 + others], given)
        return torch.autograd.grad(out.square().sum(), given)[0][:, 2:].abs().max().item()

    # rounding of a/a aside
    assert router_gradient(1, 0.3) < 1e-12
    assert router_gradient(2, 0.0) < 1e-12
    assert router_gradient(2, 0.3) > 1e-6


def test_bf16_models_keep_fp32_vectors():
    model = compression.compress(wide("olmoe", dtype=torch.bfloat16), keep=0.5)
    ones = logits(model)
    with compression.as_dropped(model):
        assert torch.equal(logits(model), ones)
    assert ones.dtype == torch.bfloat16
    assert {p.dtype for p in compression.theta_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("train", "loss"), [("theta", "lm"), ("theta", "distill"), ("theta+main", "lm"), ("all", "distill")]
)
def test_fitting_trains_what_it_says_and_restore_undoes_it(train, loss):
    model = wide("olmoe")
    model.set_experts_implementation("raymoe")
    before = copy.deepcopy(dict(model.named_parameters()))
    full = logits(model)
    compression.compress(model, keep=0.5)
    losses = compression.fit(
        model, TOKENS, train=train, loss=loss, steps=6, batch=4, learning_rate=0.02, weight_learning_rate=1e-3
    )
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    attention = {name for name in before if "self_attn" in name}
    experts = {name for name in before if ".experts." in name}
    assert moved >= {"theta": set(), "theta+main": experts, "all": experts | attention}[train]
    assert not moved & {"theta": set(before), "theta+main": attention, "all": set()}[train]
    assert all((p != 1).any() for p in compression.theta_parameters(model).values())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(compression.restore(model)), full)

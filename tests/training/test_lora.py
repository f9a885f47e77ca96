"""LoRA on attention and experts equals peft's own model in one process, and its directories go both ways."""

import json
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from raymoe.config.lora import LoraConfig
from raymoe.models import expert_parameters, load_without_experts, moe_layers
from raymoe.training.lora import add_adapters
from raymoe.training.lora_experts import ExpertAdapters, LoraRows
from raymoe.training.lora_start import start_lora
from tests.tiny_models import FAMILIES, tiny_model, tiny_switch
from tests.training.equality import OPTIMIZER
from tests.training.lora_runs import LORA, Run, logits, oracle, peft_opens, plain_opens, save_start, train
from tests.training.ranks import run_ranks


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_adapter_gradients_are_those_of_autograd(family):
    model = tiny_model(family, dtype=torch.float64)
    model.set_experts_implementation("eager")
    layer = moe_layers(model)[0]
    adapters = ExpertAdapters.of(layer, LoraConfig(**LORA))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(layer.num_experts, adapters.layout.numel, generator=generator, dtype=torch.float64)
    hidden = torch.randn(23, 32, generator=generator, dtype=torch.float64)
    index = torch.randint(layer.num_experts - 1, (23, 2), generator=generator)
    weight = torch.rand(23, 2, generator=generator, dtype=torch.float64)

    parameters = {name: p.detach() for name, p in expert_parameters(layer).items()}
    factors = {name: view.clone().requires_grad_() for name, view in adapters.layout.views(rows).items()}
    explicit = dict(parameters)
    for name in ("gate_up_proj", "down_proj"):
        change = factors[f"{name}.B"] @ factors[f"{name}.A"] * (5 / 3)
        explicit[name] = parameters[name] + (change.mT if family == "gpt_oss" else change)
    functional_call(layer.experts, explicit, (hidden, index, weight)).square().sum().backward()

    base = torch.zeros(layer.num_experts, layer.layout.numel, dtype=torch.float64)
    layer.layout.pack(parameters, base)
    effective = torch.empty_like(base)
    adapters.apply(base, rows, effective)
    effective = effective.requires_grad_()
    views = layer.layout.views(effective)
    functional_call(layer.experts, views, (hidden, index, weight)).square().sum().backward()
    found = torch.full_like(rows, torch.nan)
    assert effective.grad is not None
    adapters.project(effective.grad, rows, found)
    for name, view in adapters.layout.views(found).items():
        wanted = factors[name].grad
        assert wanted is not None
        assert ((view - wanted).norm() / wanted.norm()).item() < 1e-10, name
        assert wanted[:-1].flatten(1).norm(dim=1).min() > 0, "experts that were reached have gradients"


@given(st.sets(st.integers(0, 12)), st.integers(1, 5))
def test_rows_are_renewed_and_projected_in_runs(rows, most):
    adapters = ExpertAdapters.of(moe_layers(tiny_model("gpt_oss"))[0], LoraConfig(**LORA))
    start = torch.randn(13, adapters.expert.numel, generator=torch.Generator().manual_seed(1))
    effective = start.clone()
    state = LoraRows(effective, adapters, OPTIMIZER)
    state.parameters.normal_(generator=torch.Generator().manual_seed(2))
    state.gradients.fill_(torch.nan)
    with mock.patch("raymoe.training.lora_experts._RUN_BYTES", most * start[:1].nbytes):
        state.refresh(rows)
        state.project(start, rows)
    for row in range(13):
        wanted, gradient = start[row].clone(), torch.full_like(state.gradients[row], torch.nan)
        if row in rows:
            adapters.apply(start[row : row + 1], state.parameters[row : row + 1], wanted[None])
            adapters.project(start[row : row + 1], state.parameters[row : row + 1], gradient[None])
        torch.testing.assert_close(effective[row], wanted)
        torch.testing.assert_close(state.gradients[row], gradient, equal_nan=True)
    assert torch.equal(state.base, start)


def check(by_rank: list, runs: list[Run], parts: str) -> None:
    """All runs trained what peft's model did in one process, and nothing else."""
    for number, run in enumerate(runs):
        results = [results[number] for results in by_rank]
        assert all(result["frozen"] for result in results), run
        written = load_file(run.written / "adapter" / "adapter_model.safetensors")
        wanted = oracle("olmoe", run.steps, parts)
        assert written.keys() == wanted.keys()
        for name, value in wanted.items():
            error = ((written[name] - value).norm() / value.norm()).item()
            assert error < 1e-9, f"{run}: {name} off by {error:.1e}"
        assert results[0]["losses"] == results[-1]["losses"]


def test_training_equals_peft_in_one_process(tmp_path):
    lora = save_start("olmoe", torch.float64, tmp_path)
    base = str(tmp_path / "base")
    runs = [
        Run(base, lora, tmp_path / "0", "fssdp", "uneven"),
        Run(base, lora, tmp_path / "1", "fssdp-rm", config=(("recompute", True),)),
        Run(base, lora, tmp_path / "2", "smartmoe", "uneven", config=(("reshard_every", 2),)),
        Run(base, lora, tmp_path / "3", config=(("dense", "sharded"),)),
        Run(base, lora, tmp_path / "4", owners="uneven", saved_at=2),
    ]
    by_rank = run_ranks(2, train, runs)
    check(by_rank, runs, "both")
    check(run_ranks(1, train, runs[:1]), runs[:1], "both")
    assert by_rank[0][0]["copies"] > 0
    assert by_rank[0][2]["resharded"] > 0


@pytest.mark.parametrize("parts", ["attention", "experts"])
def test_one_of_attention_and_experts(parts, tmp_path):
    lora = save_start("olmoe", torch.float64, tmp_path, parts)
    base = str(tmp_path / "base")
    runs = [
        Run(base, lora, tmp_path / "0", "fssdp"),
        Run(base, lora, tmp_path / "1", "smartmoe", "uneven", config=(("reshard_every", 2),), saved_at=3),
    ]
    by_rank = run_ranks(2, train, runs)
    check(by_rank, runs, parts)
    held = by_rank[0][0]["bytes"]
    assert (held["optimizer"] == 0) == (parts == "attention")
    opened = peft_opens(base, runs[0].written / "adapter", torch.float64)
    merged = plain_opens(runs[0].written / "merged", torch.float64)
    torch.testing.assert_close(logits(opened), logits(merged), rtol=1e-9, atol=1e-9)


def test_new_adapters_change_nothing_and_do_not_depend_on_the_ranks(tmp_path):
    tiny_model("qwen2_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    lora = LoraConfig(**LORA, target_modules=["q_proj", "shared_expert.down_proj"])
    runs = [
        Run(str(tmp_path / "base"), lora, tmp_path / f"{size}-{steps}", dtype=torch.bfloat16, steps=steps)
        for size in (1, 2)
        for steps in (0, 3)
    ]
    by_size = [run_ranks(size, train, runs[2 * size - 2 : 2 * size]) for size in (1, 2)]
    written = [load_file(run.written / "adapter" / "adapter_model.safetensors") for run in runs]
    assert written[0].keys() == written[2].keys()
    assert all(torch.equal(written[0][name], written[2][name]) for name in written[0])
    assert all(rows.dtype == torch.float32 for rows in by_size[0][0][0]["adapters"].values())
    for name, value in written[0].items():
        if "lora_B" in name:
            assert not value.any(), name
        else:
            assert 0.5 < value.abs().max() * value.shape[1] ** 0.5 <= 1.01, name
    dense = {name for name in written[0] if ".experts." not in name}
    assert {name.split(".")[-3] for name in dense} == {"q_proj", "down_proj"}

    base, untrained, trained = (
        plain_opens(path, torch.bfloat16)
        for path in (runs[0].base, runs[0].written / "merged", runs[3].written / "merged")
    )
    for name, value in base.state_dict().items():
        assert torch.equal(untrained.state_dict()[name], value), name
        is_adapted = name.endswith(
            ("q_proj.weight", "shared_expert.down_proj.weight", ".gate_up_proj", "experts.down_proj")
        )
        assert torch.equal(trained.state_dict()[name], value) != is_adapted, name
    wanted = logits(trained).float()
    # bfloat16 has 8 bits: peft adds what the attention's adapters give after rounding both
    assert (
        logits(peft_opens(runs[3].base, runs[3].written / "adapter", torch.bfloat16)) - wanted
    ).norm() < 0.02 * wanted.norm()
    assert (logits(base) - wanted).norm() > 0.05 * wanted.norm()


def test_directories_of_all_families(tmp_path):
    runs = []
    for family in sorted(FAMILIES):
        folder = tmp_path / family
        lora = save_start(family, torch.float32, folder)
        runs.append(Run(str(folder / "base"), lora, folder, "ep", "uneven", torch.float32, steps=0))
    run_ranks(2, train, runs)
    for run in runs:
        given, written = (
            load_file(run.written / name / "adapter_model.safetensors") for name in ("given-both", "adapter")
        )
        assert given.keys() == written.keys()
        assert all(torch.equal(given[name], written[name]) for name in given), run.base
        adapted = logits(peft_opens(run.base, run.written / "adapter", run.dtype))
        plain = logits(plain_opens(run.base, run.dtype))
        merged = logits(plain_opens(run.written / "merged", run.dtype))
        assert (adapted - merged).norm() < 1e-5 * adapted.norm(), run.base
        assert (adapted - plain).norm() > 1e-2 * adapted.norm(), run.base


def test_what_cannot_be_trained_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="attention and experts are both false"):
        LoraConfig(attention=False, experts=False)
    with pytest.raises(ValueError, match="attention: false takes no modules"):
        LoraConfig(attention=False, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"no adapter_config.json in"):
        LoraConfig(adapter=tmp_path)
    with pytest.raises(ValueError, match="family 'switch_transformers' has experts that are modules of their own"):
        add_adapters(tiny_switch(), LoraConfig(), 0)
    with pytest.raises(ValueError, match=r"no linear module is called 'w1'; there are .*q_proj"):
        add_adapters(tiny_model("mixtral"), LoraConfig(target_modules=["w1"]), 0)
    # a shared expert's: peft takes its name for that of the routed experts
    with pytest.raises(ValueError, match=r"lora.target_modules: .*'deepseek_v3'.*down_proj"):
        add_adapters(tiny_model("deepseek_v3"), LoraConfig(target_modules=["q_proj", "down_proj"]), 0)
    with (
        mock.patch.dict("sys.modules", {"peft": None}),
        pytest.raises(ValueError, match=r"pip install 'raymoe\[lora\]'"),
    ):
        add_adapters(tiny_model("olmoe"), LoraConfig(), 0)


def test_directories_that_do_not_fit_are_refused_by_name(tmp_path):
    lora = save_start("olmoe", torch.float32, tmp_path)
    assert lora.adapter is not None
    weights, config = lora.adapter / "adapter_model.safetensors", lora.adapter / "adapter_config.json"
    saved = json.loads(config.read_text())

    def start(**changes):
        model, _ = load_without_experts(tmp_path / "base", torch.float32)
        start_lora(model, lora.model_copy(update=changes), seed=0)

    start()
    with pytest.raises(ValueError, match=r"adapter_config.json: r is 3; set lora.rank to it, now it is 4"):
        start(rank=4)
    with pytest.raises(ValueError, match=r"lora_alpha is 5; set lora.alpha"):
        start(alpha=6.0)
    with pytest.raises(
        ValueError, match=r"has '.*experts.*lora_A.weight', which a model with these lora settings does not"
    ):
        start(experts=False)
    with pytest.raises(ValueError, match=r"has '.*self_attn.k_proj.lora_A.weight', which"):
        start(target_modules=["q_proj"])
    for key, value in {"use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 2}, "peft_type": "IA3"}.items():
        config.write_text(json.dumps(saved | {key: value}))
        with pytest.raises(ValueError, match=f"adapter_config.json: {key} is .*; raymoe trains adapters with {key}"):
            start()
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json: cannot be read"):
        start()
    config.write_text(json.dumps(saved))
    tensors = load_file(weights)
    name = next(name for name in tensors if "experts.lora_A" in name)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, weights)
    with pytest.raises(ValueError, match=r"experts.lora_A.weight' has shape \[23, 16\], the model needs \[24, 16\]"):
        start()
    del tensors[name]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"lacks '.*experts.lora_A.weight'"):
        start()
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: cannot be read"):
        start()

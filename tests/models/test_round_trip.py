"""Hugging Face -> raymoe -> Hugging Face, expert by expert: bit for bit the same tensors, and the same configuration."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from raymoe.models import CheckpointWriter, expert_parameter_names, load_without_experts
from tests.tiny_models import FAMILIES, tiny_model, tiny_switch

ALL = [*FAMILIES, "switch_transformers"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def tiny(family: str, **changes):
    return tiny_switch(**changes) if family == "switch_transformers" else tiny_model(family, **changes)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            assert found.keys().isdisjoint(handle.keys())
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    return found


def assert_same_bits(ours, theirs) -> None:
    found, expected = tensors_of(ours), tensors_of(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def config_of(folder) -> dict:
    tree = AutoConfig.from_pretrained(folder).to_dict()
    # both name their own folder, and no multi-token-prediction layers are written
    return {key: value for key, value in tree.items() if key not in ("_name_or_path", "num_nextn_predict_layers")}


def pass_through(source, target, *, dtype=None, experts_at_once=3, write_dtype=None, max_shard_bytes=2**30) -> None:
    """Reads `source` and writes `target`, never with more than a few experts in memory; the last experts come first."""
    model, files = load_without_experts(source, dtype)
    experts = expert_parameter_names(files.layers)
    with CheckpointWriter(
        target,
        model,
        source=source,
        dtype=files.stored_dtypes if write_dtype == "stored" else write_dtype,
        has_original_names=not files.is_fused,
        max_shard_bytes=max_shard_bytes,
    ) as writer:
        writer.add({name: value for name, value in model.state_dict().items() if name not in experts})
        for layer in files.layers:
            numbers = list(range(layer.num_experts))[::-1]
            # one buffer for all, so that a writer that keeps views of it is found out
            flat = torch.empty(experts_at_once, layer.layout.numel, dtype=files.dtype)
            for start in range(0, len(numbers), experts_at_once):
                part = numbers[start : start + experts_at_once]
                for row, expert in enumerate(part):
                    files.read(layer.index, expert, flat[row])
                writer.add_experts(layer, {expert: flat[row] for row, expert in enumerate(part)})
                flat.fill_(torch.nan)


@pytest.mark.parametrize("original_format", [True, False], ids=["per_expert", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ALL)
def test_every_bit_of_every_family(family, dtype, original_format, tmp_path):
    tiny(family, dtype=DTYPES[dtype]).save_pretrained(
        tmp_path / "theirs", save_original_format=original_format, max_shard_size="20KB"
    )
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    pass_through(tmp_path / "theirs", tmp_path / "ours", write_dtype="stored", max_shard_bytes=15_000)

    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    reopen = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    ours, theirs = (reopen.from_pretrained(tmp_path / name, dtype="auto").state_dict() for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "switch_transformers"])
def test_a_model_in_fp32_goes_back_to_what_its_files_held(family, tmp_path):
    model = tiny(family, dtype=torch.bfloat16)
    if family == "deepseek_v3":
        # as in the release: everything in bf16, the correction in fp32
        bias = model.model.layers[1].mlp.gate
        bias.e_score_correction_bias = torch.randn(8, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    pass_through(tmp_path / "theirs", tmp_path / "ours", dtype=torch.float32, write_dtype="stored")
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")
    assert config_of(tmp_path / "ours")["dtype"] in (torch.bfloat16, "bfloat16")


def test_the_correction_bias_stays_in_fp32_when_the_model_is_bf16(tmp_path):
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16)
    bias = torch.randn(8, dtype=torch.float32)
    model.model.layers[1].mlp.gate.e_score_correction_bias = bias
    model.save_pretrained(tmp_path / "theirs")
    loaded, _ = load_without_experts(tmp_path / "theirs", torch.bfloat16)
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    pass_through(tmp_path / "theirs", tmp_path / "ours")
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")


def test_one_dtype_for_all(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "theirs")
    pass_through(tmp_path / "theirs", tmp_path / "ours", write_dtype=torch.float16)
    expected = tensors_of(tmp_path / "theirs")
    for name, tensor in tensors_of(tmp_path / "ours").items():
        assert torch.equal(tensor, expected[name].half())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("limit", [1, 5_000, 10**9])
def test_no_file_holds_more_than_its_limit_unless_one_tensor_does(limit, tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "theirs")
    pass_through(tmp_path / "theirs", tmp_path / "ours", max_shard_bytes=limit, experts_at_once=1)
    files = list((tmp_path / "ours").glob("*.safetensors"))
    # an expert of 6 KiB is what may come on top before a shard is written
    expert_bytes = 3 * 16 * 32 * 4
    for file in files:
        with safe_open(file, framework="pt") as handle:
            sizes = [handle.get_tensor(name).nbytes for name in handle.keys()]  # noqa: SIM118 (not a dict)
        assert len(sizes) == 1 or sum(sizes) <= limit + expert_bytes
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "ours").values())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")


def test_what_stands_beside_the_weights_goes_along(tmp_path):
    source = tmp_path / "theirs"
    tiny_model("olmoe").save_pretrained(source)
    beside = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "tokenizer.model": "sentencepiece",
        "generation_config.json": '{"temperature": 0.6, "do_sample": true, "max_new_tokens": 7}',
    }
    for name, text in beside.items():
        (source / name).write_text(text)
    (source / "modeling_custom.py").write_text("raise SystemExit")
    pass_through(source, tmp_path / "ours")
    assert {name: (tmp_path / "ours" / name).read_text() for name in beside} == beside
    assert not (tmp_path / "ours" / "modeling_custom.py").exists()


def test_an_unwritten_tensor_leaves_nothing_behind(tmp_path):
    model = tiny_model("olmoe")
    state = model.state_dict()
    lacking = state.pop("model.layers.1.self_attn.q_norm.weight")
    with pytest.raises(ValueError, match=r"1 tensors .* not added, the first is 'model\.layers\.1\.self_attn\.q_norm"):
        _write(tmp_path / "out", model, state)
    assert not list(tmp_path.iterdir())
    state["model.layers.1.self_attn.q_norm.weight"] = lacking
    _write(tmp_path / "out", model, state)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_tensor_added_twice_is_named(tmp_path):
    model = tiny_model("olmoe")

    def twice():
        with CheckpointWriter(tmp_path / "out", model) as writer:
            writer.add(model.state_dict())
            writer.add({"model.norm.weight": model.model.norm.weight})

    with pytest.raises(ValueError, match=r"'model\.norm\.weight' was written before"):
        twice()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_lacking_expert_is_named(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "theirs")
    model, files = load_without_experts(tmp_path / "theirs", None)
    experts = expert_parameter_names(files.layers)

    def write():
        with CheckpointWriter(tmp_path / "ours", model) as writer:
            writer.add({name: value for name, value in model.state_dict().items() if name not in experts})
            for layer in files.layers:
                flat = torch.zeros(layer.layout.numel)
                writer.add_experts(layer, {e: flat for e in range(layer.num_experts) if (layer.index, e) != (1, 4)})

    expected = (
        r"gate_up_proj' lacks expert 4" if family == "gpt_oss" else r"3 tensors .* 'model\.layers\.1\.mlp\.experts\.4\."
    )
    with pytest.raises(ValueError, match=expected):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_expert_that_the_layer_does_not_have_is_named(tmp_path):
    model = tiny_model("olmoe")

    def write():
        with CheckpointWriter(tmp_path / "ours", model) as writer:
            layer = writer._layers[0]
            writer.add_experts(layer, {8: torch.zeros(layer.layout.numel)})

    with pytest.raises(ValueError, match="no expert 8, the layer has 8"):
        write()


def _write(path, model, state) -> None:
    with CheckpointWriter(path, model) as writer:
        writer.add(state)

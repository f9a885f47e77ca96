import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raymoe.models import CheckpointWriter, attach_runtime, load_without_experts, moe_layers, weights_of
from tests.tiny_models import FAMILIES, tiny_model


def from_files(files):
    """An experts runtime that reads each expert it needs from the checkpoint."""
    from raymoe.kernels import moe_mlp

    def runtime(layer, hidden, index, weight):
        flat = torch.empty(layer.num_experts, layer.layout.numel)
        for expert in index.unique().tolist():
            files.read(layer.index, expert, flat[expert])
        gate_up, down, biases = weights_of(layer, layer.layout.views(flat))
        return moe_mlp(hidden, gate_up, down, index, weight, spec=layer.spec, biases=biases)

    return runtime


@pytest.mark.parametrize("original_format", [True, False], ids=["per_expert", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_left_in_the_files_give_the_same_logits(family, original_format, tmp_path):
    model = tiny_model(family)
    model.set_experts_implementation("raymoe")
    model.save_pretrained(tmp_path, save_original_format=original_format)
    ids = torch.randint(2, 96, (2, 13))
    with torch.no_grad():
        expected = model(ids).logits

    loaded, files = load_without_experts(tmp_path, torch.float32)
    attach_runtime(loaded, from_files(files))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    assert all(parameter.is_meta for layer in moe_layers(loaded) for parameter in layer.experts.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_written_piece_by_piece_opens_in_transformers(family, tmp_path):
    model = tiny_model(family)
    experts = {f"{layer.name}.{name}": p for layer in moe_layers(model) for name, p in layer.experts.named_parameters()}
    state = model.state_dict()
    with CheckpointWriter(tmp_path / "out", model) as writer:
        writer.add({name: value for name, value in state.items() if name not in experts})
        for layer in moe_layers(model):
            writer.add({f"{layer.name}.{name}": p for name, p in layer.experts.named_parameters()})
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert reopened.keys() == state.keys()
    assert all(torch.equal(reopened[name], value) for name, value in state.items())


def test_tied_embeddings_are_written_once_and_open_tied(tmp_path):
    model = tiny_model("olmoe", tie_word_embeddings=True)
    with CheckpointWriter(tmp_path / "out", model) as writer:
        writer.add(model.state_dict())
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    reopened, _ = load_without_experts(tmp_path / "out", torch.float32)
    assert reopened.lm_head.weight is reopened.model.embed_tokens.weight
    assert torch.equal(reopened.lm_head.weight, model.lm_head.weight)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def write_half():
        with CheckpointWriter(tmp_path / "out", model) as writer:
            writer.add({"lm_head.weight": model.lm_head.weight})
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("lost", [["up"], ["gate", "up"]], ids=["half_an_expert", "a_whole_expert"])
def test_missing_tensors_are_named(lost, tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in lost:
        del tensors[f"model.layers.1.mlp.experts.5.{name}_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj' for expert 5 \(1 of 8 missing\)"):
        load_without_experts(tmp_path, torch.float32)


def test_a_directory_without_safetensors_says_so(tmp_path):
    tiny_model("olmoe").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no model\.safetensors there"):
        load_without_experts(tmp_path, torch.float32)


def test_reads_cast_to_the_wanted_dtype(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path)
    _, files = load_without_experts(tmp_path, torch.bfloat16)
    layer = files.layers[1]
    out = torch.empty(layer.layout.numel, dtype=torch.bfloat16)
    read_bytes = files.read(1, 3, out)
    views = layer.layout.views(out[None])
    for name, parameter in moe_layers(model)[1].experts.named_parameters():
        assert torch.equal(views[name][0], parameter[3].to(torch.bfloat16))
    assert read_bytes == sum(p[3].nbytes for p in moe_layers(model)[1].experts.parameters())
    assert files.expert_bytes == layer.layout.numel * 2

"""Directories that are damaged, incomplete or do not belong together are refused by the name of what is wrong."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymoe.models import CheckpointWriter, load_without_experts
from tests.tiny_models import tiny_model, tiny_switch


def saved(folder, family="olmoe", **options):
    tiny_model(family).save_pretrained(folder, **options)
    return folder


def change_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_without_experts(folder, torch.float32)


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_file_cut_short(left, tmp_path):
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused(tmp_path, r"model\.safetensors: not a whole safetensors file .*fetch it again")


def test_a_header_of_nonsense(tmp_path):
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(b"\x10" + bytes(7) + b"not json at all!" + file.read_bytes()[24:])
    refused(tmp_path, "not a whole safetensors file")


def test_an_index_that_names_an_absent_file(tmp_path):
    saved(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    refused(tmp_path, f"no {lost.name} there")


def test_an_index_and_a_file_that_disagree(tmp_path):
    saved(tmp_path, max_shard_size="20KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = sorted(set(index["weight_map"].values()))
    name = next(name for name, held in index["weight_map"].items() if held == names[0])
    file.write_text(json.dumps({"weight_map": index["weight_map"] | {name: names[1]}}))
    refused(tmp_path, f"says that {names[1]} holds '{name}', but it does not")
    file.write_text("{")
    refused(tmp_path, "index.json: not readable as JSON")
    file.write_text("{}")
    refused(tmp_path, "no 'weight_map'")
    file.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    refused(tmp_path, "is not the name of a file in that directory")


def test_a_tensor_in_two_files(tmp_path):
    saved(tmp_path, max_shard_size="20KB")
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    save_file({"lm_head.weight": torch.zeros(96, 32), **load_file(file)}, file)
    refused(tmp_path, r"'lm_head\.weight' is in .* and again in .*; remove one")


def test_a_config_that_is_absent_or_no_config(tmp_path):
    saved(tmp_path)
    (tmp_path / "config.json").write_text("[")
    refused(tmp_path, r"config\.json: not readable as JSON")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, r"no config\.json in it")


@pytest.mark.parametrize(("num_experts", "text"), [
    (6, r"experts\.[67]\..* is expert [67], but by config\.json a layer has 6 experts"),
    (9, r"lacks 'model\.layers\.0\.mlp\.experts\.gate_up_proj' for expert 8 \(1 of 9 missing\)|gate\.weight' .*shape"),
])  # fmt: skip
def test_another_number_of_experts(num_experts, text, tmp_path):
    change_config(saved(tmp_path), num_experts=num_experts)
    refused(tmp_path, f"{text}|gate.weight.* has shape .*8, 32.* but by config.json it is .*{num_experts}, 32")


def test_another_number_of_fused_experts(tmp_path):
    change_config(saved(tmp_path, "gpt_oss"), num_local_experts=5)
    refused(tmp_path, r"has shape \[6.*\], but by config\.json it is \[5")


def test_another_width(tmp_path):
    change_config(saved(tmp_path), intermediate_size=24)
    refused(tmp_path, r"experts\.0\.gate_proj\.weight' in model\.safetensors has shape \[16, 32\], but .* \[24, 32\]")


def test_fewer_layers_than_the_files_hold(tmp_path):
    change_config(saved(tmp_path), num_hidden_layers=1)
    refused(tmp_path, r"tensors have no place .*OlmoeForCausalLM.*'model\.layers\.1\.")


def test_more_layers_than_the_files_hold(tmp_path):
    change_config(saved(tmp_path), num_hidden_layers=3)
    refused(tmp_path, r"lacks 'model\.layers\.2\.mlp\.experts\.gate_up_proj' for expert 0")


def test_a_dense_tensor_of_another_shape_or_none(tmp_path):
    saved(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    refused(tmp_path, r"'model\.norm\.weight' in model\.safetensors has shape \[31\], but by config\.json it is \[32\]")
    change_tensors(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    refused(tmp_path, r"1 tensors are missing .*'model\.norm\.weight'")


def test_tied_weights_that_differ(tmp_path):
    tiny_model("olmoe", tie_word_embeddings=True).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model, _ = load_without_experts(tmp_path, None)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    refused(tmp_path, r"ties 'lm_head\.weight' to 'model\.embed_tokens\.weight', but the files hold two different")


def test_a_lost_correction_bias(tmp_path):
    saved(tmp_path, "deepseek_v3")
    change_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias"))
    refused(tmp_path, r"1 tensors are missing .*e_score_correction_bias")


def test_a_tensor_that_is_not_the_models(tmp_path):
    saved(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({"v_head.weight": torch.ones(1, 32)}))
    refused(tmp_path, r"1 tensors have no place .*'v_head\.weight' \[1, 32\] in model\.safetensors.*does not drop them")


def test_rotary_tables_of_old_files_are_left_out_and_said(tmp_path, caplog):
    saved(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)}))
    with caplog.at_level(logging.WARNING, "raymoe"):
        _, files = load_without_experts(tmp_path, None)
    assert files.left_out == (name,)
    assert f"1 tensors are left out, for the model computes without them: '{name}'" in caplog.text


def test_an_expert_of_switch_that_is_lost(tmp_path):
    tiny_switch().save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.pop("decoder.block.3.layer.2.mlp.experts.expert_2.wo.weight"))
    refused(tmp_path, r"lacks 'decoder\.block\.3\.layer\.2\.mlp\.experts\.down_proj' for expert 2 \(1 of 5")


def test_multi_token_prediction_layers_are_left_out_and_not_claimed(tmp_path, caplog):
    source = saved(tmp_path / "theirs", "deepseek_v3")
    prediction = {
        "model.layers.2.eh_proj.weight": torch.ones(32, 64),
        "model.layers.2.enorm.weight": torch.ones(32),
        "model.layers.2.mlp.experts.0.gate_proj.weight": torch.ones(16, 32),
        "model.layers.2.shared_head.head.weight": torch.ones(96, 32),
    }
    change_tensors(source, lambda tensors: tensors.update(prediction))
    change_config(source, num_nextn_predict_layers=1)
    with caplog.at_level(logging.WARNING, "raymoe"):
        model, files = load_without_experts(source, None)
    assert set(files.left_out) == prediction.keys()
    assert "4 tensors are left out" in caplog.text
    assert "'model.layers.2." in caplog.text
    with CheckpointWriter(tmp_path / "ours", model) as writer:
        writer.add({n: t for n, t in model.state_dict().items() if ".experts." not in n})
        for layer in files.layers:
            writer.add_experts(layer, {e: torch.zeros(layer.layout.numel) for e in range(layer.num_experts)})
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["num_nextn_predict_layers"] == 0

    change_config(source, num_nextn_predict_layers=0)
    refused(source, r"4 tensors have no place .*'model\.layers\.2\.")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_quantisations_are_refused_by_name(method, tmp_path):
    change_config(saved(tmp_path), quantization_config={"quant_method": method, "bits": 4})
    refused(tmp_path, f"quant_method: '{method}' weights cannot be read expert by expert")

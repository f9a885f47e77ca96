"""The size of a model from its configuration, against the model itself."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_outputs import MoEModelOutput

from raymoe.models import moe_layers
from raymoe.models.size import ModelSize, model_size
from tests.tiny_models import FAMILIES, tiny_model, tiny_switch

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_counts_are_those_of_the_model(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / family)
    size = model_size(tmp_path / family)

    experts = [p for layer in moe_layers(model) for p in layer.experts.parameters(recurse=False)]
    assert size.name == size.model_type == family
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.expert_parameters == sum(p.numel() for p in experts)
    assert (size.dtype, size.parameter_bytes) == ("float32", 4)
    assert size.layers == len(moe_layers(model))
    assert size.blocks == 2
    assert size.expert_bytes * size.experts * size.layers == 4 * size.expert_parameters
    first = moe_layers(model)[0]
    assert (size.choices, size.experts) == (first.top_k, first.num_experts)
    assert size.matrices * size.hidden_size * size.expert_width <= size.expert_bytes // 4
    assert size.active_parameters == size.dense_parameters + size.expert_parameters * size.choices // size.experts
    assert size.lookup_parameters == 96 * 32


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_token_leaves_as_much_in_the_cache_as_said(family, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    layers = model(input_ids=tokens, use_cache=True).past_key_values.layers
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    assert model_size(tmp_path).kv_bytes == kept // 3 * 4


def test_a_published_model_by_hand(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    size = model_size(tmp_path)
    expert = 3 * 2048 * 768
    attention = 2048 * (32 + 2 * 4 + 32) * 128 + 2 * 128
    dense = 2 * 151936 * 2048 + 48 * (attention + 128 * 2048 + 2 * 2048) + 2048
    assert size == ModelSize(
        name=tmp_path.name,
        model_type="qwen3_moe",
        dtype="bfloat16",
        parameter_bytes=2,
        dense_parameters=dense,
        expert_parameters=48 * 128 * expert,
        blocks=48,
        layers=48,
        experts=128,
        choices=8,
        expert_bytes=2 * expert,
        hidden_size=2048,
        expert_width=768,
        matrices=3,
        vocab_size=151936,
        lookup_parameters=151936 * 2048,
        attention_width=32 * 128,
        has_latent_attention=False,
        kv_bytes=48 * 2 * 4 * 128 * 2,
        active_parameters=dense + 48 * 8 * expert,
    )


def test_a_tied_embedding_is_multiplied_and_not_looked_up(tmp_path):
    tiny_model("olmoe", tie_word_embeddings=True).config.save_pretrained(tmp_path)
    untied, tied = tmp_path / "untied", model_size(tmp_path)
    tiny_model("olmoe").config.save_pretrained(untied)
    assert tied.lookup_parameters == 0
    assert model_size(untied).parameters - tied.parameters == 96 * 32


def test_dtype_comes_from_the_files_where_the_configuration_is_silent(tmp_path):
    tree = tiny_model("olmoe").config.to_dict()
    del tree["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert model_size(tmp_path).dtype == "float32"
    save_file({"any": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert (model_size(tmp_path).dtype, model_size(tmp_path).parameter_bytes) == ("bfloat16", 2)


def test_an_encoder_decoder(tmp_path):
    model = tiny_switch(d_kv=12)
    model.config.save_pretrained(tmp_path)
    size = model_size(tmp_path)
    expert = 2 * 32 * 48
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert (size.blocks, size.layers, size.experts, size.choices, size.matrices) == (8, 4, 5, 1, 2)
    assert (size.expert_parameters, size.expert_width) == (4 * 5 * expert, 48)
    assert size.active_parameters == size.dense_parameters + 4 * expert
    assert (size.attention_width, size.lookup_parameters) == (48, 0)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    encoded = MoEModelOutput(last_hidden_state=torch.zeros(1, 3, 32))
    cache = model(encoder_outputs=encoded, decoder_input_ids=tokens, use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.self_attention_cache.layers)
    assert size.kv_bytes == kept // 3 * 4


def test_a_configuration_alone_and_its_name(tmp_path):
    tiny_model("mixtral").config.save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "my-mixtral.json")
    assert model_size(tmp_path / "my-mixtral.json").name == "my-mixtral"


def test_nothing_is_allocated(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    seen = []
    build = AutoModelForCausalLM.from_config
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *a, **k: seen.append(build(*a, **k)) or seen[-1])
    model_size(tmp_path)
    assert all(p.is_meta for p in seen[0].parameters())


def test_what_cannot_be_sized_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json in it"):
        model_size(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        model_size(tmp_path / "absent.json")
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        model_size(tmp_path)
    file.write_text("{}")
    with pytest.raises(ValueError, match="no 'model_type'"):
        model_size(tmp_path)
    file.write_text('{"model_type": "moe_of_tomorrow"}')
    with pytest.raises(ValueError, match="family 'moe_of_tomorrow'"):
        model_size(tmp_path)
    file.write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="cannot build a language model of family 'vit'"):
        model_size(tmp_path)
    LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"'llama'.* has no MoE layer"):
        model_size(tmp_path)

"""Random models of a few thousand parameters, one a family."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_MLA = {
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "routed_scaling_factor": 1.5,
    "n_routed_experts": 8,
}
FAMILIES: dict[str, dict] = {
    "mixtral": {"num_local_experts": 6, "intermediate_size": 48, "head_dim": 8},
    "olmoe": {"num_experts": 8, "intermediate_size": 16},
    "qwen2_moe": {
        "num_experts": 7,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "intermediate_size": 48,
    },
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 48, "head_dim": 8},
    "phimoe": {
        "num_local_experts": 6,
        "intermediate_size": 48,
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": _MLA | {"topk_method": "greedy", "n_group": None, "topk_group": None, "head_dim": 8},
    "deepseek_v3": _MLA | {"n_group": 2, "topk_group": 1, "head_dim": 8},
    "gpt_oss": {
        "num_local_experts": 6,
        "intermediate_size": 32,
        "head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
# an encoder-decoder, so apart from the families above; two sparse blocks in each half
_SWITCH = {
    "vocab_size": 96,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": 5,
    "expert_capacity": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A random model of `family` in eval mode; weights are spread so that tokens route differently."""
    config = CONFIG_MAPPING[family](**(_COMMON | FAMILIES[family] | changes))
    torch.manual_seed(seed)
    return _spread(AutoModelForCausalLM.from_config(config, dtype=dtype), seed)


def tiny_switch(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A random switch_transformers model in eval mode; its capacity is small enough that tokens are dropped."""
    config = CONFIG_MAPPING["switch_transformers"](**(_SWITCH | changes))
    torch.manual_seed(seed)
    return _spread(AutoModelForSeq2SeqLM.from_config(config, dtype=dtype), seed)


def _spread(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.eval()

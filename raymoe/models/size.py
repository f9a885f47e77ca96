"""How large a model is, from its configuration alone: built on the meta device, no weights are read.

H hidden size, I expert width, K choices per token.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raymoe.models.config_file import build_on_meta, read_config
from raymoe.models.layers import moe_layers

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_STATEFUL_LAYERS = ("linear_attention", "mamba", "recurrent")


@dataclass(frozen=True)
class ModelSize:
    """What planning needs to know of a MoE model. Counts are of parameters; bytes are in `dtype`."""

    name: str
    model_type: str
    dtype: str
    """Name of torch's, e.g. bfloat16: what the configuration, or else the first weights file, says; float32 if neither."""
    parameter_bytes: int
    """Of one parameter."""
    dense_parameters: int
    """All but the experts': attention, norms, routers, shared experts, embeddings."""
    expert_parameters: int
    """Of all experts of all layers."""
    blocks: int
    """Transformer blocks, those without experts included."""
    layers: int
    """MoE layers."""
    experts: int
    """Per MoE layer."""
    choices: int
    """K."""
    expert_bytes: int
    """Of one expert's parameters."""
    hidden_size: int
    expert_width: int
    matrices: int
    """H x I matrices of an expert: 3 gated, 2 not."""
    vocab_size: int
    lookup_parameters: int
    """Of an input embedding that the output does not share: rows are looked up, nothing is multiplied; else 0."""
    attention_width: int
    """Query heads x head size."""
    has_latent_attention: bool
    """Multi-head latent attention (DeepSeek): the KV cache keeps latents."""
    kv_bytes: int
    """A token in the KV cache takes this over all layers. An upper bound where layers keep a sliding window only."""
    active_parameters: int
    """That a token passes: all dense ones and K experts a MoE layer."""

    @property
    def parameters(self) -> int:
        return self.dense_parameters + self.expert_parameters


def model_size(path: Path | str) -> ModelSize:
    """The size of the model in a Hugging Face directory, or of one `config.json` alone.

    Raises:
        ValueError: no configuration there, a family that transformers does not know as a language model, or one
            without MoE layers that raymoe can reach.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: no {'config.json in it' if path.is_dir() else 'such file'}; give a Hugging Face model "
                         "directory or its config.json")  # fmt: skip
    config = read_config(file)
    dtype = config.dtype or getattr(torch, _dtype_of_files(file.parent) or "float32")
    assert isinstance(dtype, torch.dtype)
    try:
        model = build_on_meta(config, dtype)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    layers = moe_layers(model)
    first = layers[0]
    expert_numel = [sum(field.numel for field in layer.layout.fields) for layer in layers]
    expert_parameters = sum(layer.num_experts * numel for layer, numel in zip(layers, expert_numel, strict=True))
    dense_parameters = sum(parameter.numel() for parameter in model.parameters()) - expert_parameters
    text = config.get_text_config()
    down = next(field for field in first.layout.fields if field.name == "down_proj")
    expert_width = down.numel // text.hidden_size
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is None or getattr(head, "weight", None) is getattr(table, "weight", None)
    return ModelSize(
        name=(file.resolve().parent.name if file.name == "config.json" else file.stem) or config.model_type,
        model_type=config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        parameter_bytes=dtype.itemsize,
        dense_parameters=dense_parameters,
        expert_parameters=expert_parameters,
        blocks=text.num_hidden_layers + (text.num_decoder_layers if config.is_encoder_decoder else 0),
        layers=len(layers),
        experts=max(layer.num_experts for layer in layers),
        choices=first.top_k,
        expert_bytes=max(expert_numel) * dtype.itemsize,
        hidden_size=text.hidden_size,
        expert_width=expert_width,
        matrices=3 if first.spec.is_gated else 2,
        vocab_size=text.vocab_size,
        lookup_parameters=0 if is_tied else table.get_parameter("weight").numel(),
        attention_width=text.num_attention_heads * _head_size(text),
        has_latent_attention=_is_latent(text),
        kv_bytes=_kv_values(text) * dtype.itemsize,
        active_parameters=dense_parameters
        + sum(layer.top_k * numel for layer, numel in zip(layers, expert_numel, strict=True)),
    )


def _head_size(text: Any) -> int:
    """Elements of a query's head."""
    if getattr(text, "qk_nope_head_dim", None) is not None:
        return text.qk_nope_head_dim + text.qk_rope_head_dim
    return (
        getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // text.num_attention_heads
    )


def _kv_values(text: Any) -> int:
    """Elements that one token leaves in the KV cache of all layers."""
    if text.is_encoder_decoder:
        # the keys and values of the encoder's tokens are kept as well, by every block of the decoder
        return text.num_decoder_layers * 2 * text.num_attention_heads * _head_size(text)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    caching = sum(kind not in _STATEFUL_LAYERS for kind in kinds)
    if _is_latent(text):
        return caching * (text.kv_lora_rank + text.qk_rope_head_dim)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return caching * 2 * heads * _head_size(text)


def _is_latent(text: Any) -> bool:
    return bool(getattr(text, "kv_lora_rank", None))


def _dtype_of_files(folder: Path) -> str | None:
    """Of the first tensor of the first safetensors file; None without one. Reads the file's header alone."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                return _DTYPES.get(entry["dtype"])
    return None

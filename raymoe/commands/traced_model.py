"""A model and a text to run through it: what `raymoe trace` and `raymoe predictor train` begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from raymoe.models import MoELayer, moe_layers
from raymoe.training.batches import Batches, pack
from raymoe.training.text import read_documents
from raymoe.training.tokenizer import load_tokenizer


def look_at(model: Path) -> tuple[PretrainedConfig, list[MoELayer]]:
    """A model's configuration and MoE layers, on the meta device: refuses what has no experts before any weight is read.

    Raises:
        ValueError: no directory, not a causal language model, no MoE layers, or layers that differ.
    """
    if not model.is_dir():
        raise ValueError(f"model directory {str(model)!r} does not exist")
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ValueError(
            f"{model}: transformers does not open it as a causal language model: {_one_line(error)}"
        ) from None
    layers = moe_layers(network)
    sizes = sorted({(layer.num_experts, layer.top_k) for layer in layers})
    if len(sizes) > 1:
        raise ValueError(
            f"{model}: its MoE layers differ in (experts, experts a token): {sizes}; a trace needs them alike"
        )
    return config, layers


def text_batches(
    model: Path, config: PretrainedConfig, data: str, batch: int, sequence_length: int, steps: int, seed: int
) -> Batches:
    """`steps` batches of sequences of the text, in the model's own tokens.

    Raises:
        ValueError: a sequence longer than the model takes, a tokenizer of another model, or too little text.
    """
    text_config = config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise ValueError(f"sequence_length = {sequence_length}: the model takes at most {longest} tokens")
    tokenizer = load_tokenizer(model)
    stream = pack(read_documents(data), tokenizer, sequence_length)
    if stream.tokens.max() >= text_config.vocab_size:
        raise ValueError(
            f"{model}: its tokenizer gives token {stream.tokens.max()}, but the model knows {text_config.vocab_size} only"
        )
    batches = Batches(stream, sequence_length, batch, seed)
    if batches.num_sequences < steps * batch:
        raise ValueError(
            f"too little text: {batches.num_sequences} sequences of {sequence_length} tokens, but {steps} steps of {batch} take "
            f"{steps * batch}. Give more text, or lower steps, batch or sequence_length."
        )
    return batches


def load_routed(model: Path) -> PreTrainedModel:
    """A model in eval mode, on CUDA where there is one, whose experts are raymoe's.

    Raises:
        ValueError: weights that cannot be read, or are not all there.
    """
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", local_files_only=True, experts_implementation="raymoe", output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{model}: cannot read its weights: {_one_line(error)}") from None
    network, loaded = opened
    if loaded["missing_keys"]:
        # transformers would draw them at random, and the routing with them
        missing = sorted(loaded["missing_keys"])
        raise ValueError(f"{model}: {len(missing)} tensors are missing from its files, the first is '{missing[0]}'")
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _one_line(error: Exception) -> str:
    """The beginning of what transformers says, which may be pages."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."

"""Read a model's configuration and build the model that it describes, without weights."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)


def read_config(file: Path) -> PretrainedConfig:
    """The configuration in a `config.json`.

    Raises:
        ValueError: not there, not JSON, or not the configuration of a family that transformers knows; names the file.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent}: no {file.name} in it; give a Hugging Face model directory")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(tree, dict) or "model_type" not in tree:
        raise ValueError(f"{file}: no 'model_type' in it; give the config.json of a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"{file}: transformers does not take it as a configuration of family '{tree['model_type']}': {one_line(error)}"
        ) from None


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model of `config` on the meta device: with a language-model head, encoder-decoder where the family is one.

    Raises:
        ValueError: transformers cannot build it; names the family.
    """
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto_class.from_config(config, dtype=dtype, **options)
    except Exception as error:
        raise ValueError(
            f"transformers cannot build a language model of family '{config.model_type}' from its configuration: "
            f"{one_line(error)}"
        ) from None


def one_line(error: Exception) -> str:
    """The start of another library's message, on one line."""
    return " ".join(str(error).split())[:300]

"""A compressed model as a directory: the family's own files, `compressed_experts.safetensors`, and what says that it is one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raymoe.compression.attach import constants_of, install, is_vector, set_constants, settings_of, theta_parameters
from raymoe.compression.settings import CompressionSettings
from raymoe.models import moe_layers
from raymoe.models.families import FAMILIES, PREFIX, class_of, family_of

FILE = "compressed_experts.safetensors"


def save(
    model: PreTrainedModel,
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> None:
    """Writes a compressed model as a Hugging Face directory, whole or not at all. What stood there is replaced.

    `import raymoe.models` lets `AutoModelForCausalLM.from_pretrained` open it; without that, transformers refuses its
    `model_type` rather than run the model without its compression.

    Args:
        options: as `save_pretrained` of transformers takes them, e.g. max_shard_size.

    Raises:
        ValueError: the model is not compressed, or its family has no such name.
    """
    settings, path = settings_of(model), Path(path)
    family = family_of(model.config)
    if family not in FAMILIES:
        raise ValueError(f"model family '{family}' cannot be saved compressed; {', '.join(FAMILIES)} can")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        state = {name: tensor for name, tensor in model.state_dict().items() if not is_vector(name)}
        PreTrainedModel.save_pretrained(model, partial, state_dict=state, **options)
        _mark(partial / "config.json", family, settings)
        tensors = {name: p.detach().cpu().contiguous() for name, p in theta_parameters(model).items()}
        for layer, constants in constants_of(model).items():
            tensors |= {f"{layer}.{name}": tensor.detach().cpu().contiguous() for name, tensor in constants.items()}
        save_file(tensors, partial / FILE, metadata={"format": "pt"})
        (partial / FILE).chmod(partial.stat().st_mode & 0o666)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        retired = path.with_name(f".{path.name}.{os.getpid()}.retired")
        if path.exists():
            path.rename(retired)
        partial.rename(path)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_part(model: PreTrainedModel, path: Path, settings: dict[str, Any]) -> None:
    """Puts the compression of a directory on the model that was loaded from it.

    Raises:
        ValueError: its file is missing, unreadable, or of another model.
    """
    install(model, CompressionSettings.from_dict(settings))
    load_vectors(model, path)


def load_vectors(model: PreTrainedModel, path: Path | str) -> None:
    """Reads vectors and what was measured from a directory into a model with the compression on.

    Raises:
        ValueError: as `open_part`.
    """
    file = Path(path) / FILE
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot read the vectors of compressed experts: {error}") from None
    wanted = theta_parameters(model)
    constants: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for name, parameter in wanted.items():
            given = tensors.pop(name, None)
            if given is None or given.shape != parameter.shape or not given.isfinite().all():
                raise ValueError(
                    f"{file}: '{name}' must be finite and {tuple(parameter.shape)}, "
                    f"got {'nothing' if given is None else tuple(given.shape)}; the file is of another model"
                )
            parameter.copy_(given)
    layers = {layer.name for layer in moe_layers(model)}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        if layer not in layers:
            raise ValueError(f"{file}: '{name}' belongs to no MoE layer of this model")
        constants.setdefault(layer, {})[key] = tensor
    set_constants(model, constants)


def _mark(file: Path, family: str, settings: CompressionSettings) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model_type"] = PREFIX + family
    config["architectures"] = [class_of(family).__name__]
    config["raymoe"] = {"compression": settings.to_dict()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

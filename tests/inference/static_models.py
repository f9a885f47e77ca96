"""Tiny models for static batches, saved once, and what they should answer."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from raymoe.inference.static_grouping import UnitOptions
from tests.tiny_models import tiny_model, tiny_switch

LENGTHS = [3, 9, 15, 5, 1]
EAGER = UnitOptions(margin=0.0, copy_cost=0.0, stride=1)
"""Exchanges sequences whenever that seems to save a byte."""

_FOLDER = tempfile.TemporaryDirectory(prefix="raymoe-static-")
_KNOWN: dict[tuple[PreTrainedModel, tuple[int, ...], str], list[int]] = {}


def lively_switch(**changes: Any) -> PreTrainedModel:
    """A Switch whose experts and decoder matter to what it says."""
    sizes = {"num_layers": 2, "num_decoder_layers": 2, "tie_word_embeddings": False}
    model = tiny_switch(**(sizes | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name and name.endswith("wo.weight"):
                parameter.mul_(5.0)
    return model


@cache
def saved(family: str) -> tuple[PreTrainedModel, Path]:
    """A model and its directory; Switch with a capacity that binds in nearly every input."""
    match family:
        case "switch":
            model = lively_switch(expert_capacity=1)
        case "gpt_oss":
            model = tiny_model("gpt_oss", layer_types=["full_attention", "sliding_attention"], sliding_window=8)
        case _:
            model = tiny_model(family)
    model.save_pretrained(Path(_FOLDER.name) / family)
    return model, Path(_FOLDER.name) / family


def truth(model: PreTrainedModel, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """Of the whole model in memory by transformers' `generate`, each input alone and without padding."""
    whole: Any = model
    answers = []
    for prompt in prompts:
        key = model, tuple(prompt), repr(options)
        if key not in _KNOWN:
            out = whole.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0, **options)
            _KNOWN[key] = out[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()
        answers.append(_KNOWN[key])
    return answers


def config(**options: Any) -> GenerationConfig:
    """Greedy, twelve tokens."""
    return GenerationConfig(**({"max_new_tokens": 12, "do_sample": False} | options))

"""`raymoe_<family>`: what a directory calls a model that is no longer its family's, so that plain transformers refuses it.

Importing this module registers the name of each family with transformers. Such a configuration carries a key `raymoe`, which says
what is different; for each part of it somebody has said how to open it (`on_opening`).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "phimoe", "deepseek_v2", "deepseek_v3", "gpt_oss")
PREFIX = "raymoe_"
_OPENERS = {"compression": "raymoe.compression.files"}
"""Part of the key `raymoe` -> the module whose `open_part(model, path, settings)` and `save(model, path)` know it."""


def family_of(config: PretrainedConfig) -> str:
    """The transformers family that a configuration is of, whether or not it is still that family's model."""
    return config.model_type.removeprefix(PREFIX)


def open_parts(model: PreTrainedModel, path: Path | str) -> None:
    """Puts on a model that was just loaded from `path` what its configuration says is different.

    Raises:
        ValueError: a part that this version does not know, or whose file is missing or does not fit.
    """
    for part, settings in (getattr(model.config, "raymoe", None) or {}).items():
        if part not in _OPENERS:
            raise ValueError(f"{path}: config.json has raymoe.{part}, which this version does not know; update raymoe")
        importlib.import_module(_OPENERS[part]).open_part(model, Path(path), settings)


def _register(family: str) -> None:
    base_config = CONFIG_MAPPING[family]
    base_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    name = PREFIX + family

    def from_pretrained(cls: Any, path: Any, *args: Any, **options: Any) -> Any:
        opened = super(model, cls).from_pretrained(path, *args, **options)
        open_parts(opened[0] if isinstance(opened, tuple) else opened, path)
        return opened

    def save_pretrained(self: Any, path: Any, *args: Any, **options: Any) -> None:
        for part in getattr(self.config, "raymoe", None) or {}:
            importlib.import_module(_OPENERS[part]).save(self, Path(path), **options)

    config = type(f"Raymoe{base_config.__name__}", (base_config,), {"model_type": name, "__module__": __name__})
    methods: dict[str, Any] = {"from_pretrained": classmethod(from_pretrained), "save_pretrained": save_pretrained}
    model = type(
        f"Raymoe{base_model.__name__}", (base_model,), {"config_class": config, "__module__": __name__} | methods
    )
    globals()[config.__name__], globals()[model.__name__] = config, model
    AutoConfig.register(name, config)
    AutoModelForCausalLM.register(config, model)
    conversion = get_checkpoint_conversion_mapping(family)
    if conversion is not None:
        register_checkpoint_conversion_mapping(name, conversion)


def class_of(family: str) -> type[PreTrainedModel]:
    """The model class of `raymoe_<family>`."""
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[PREFIX + family]]
    return found


for _family in FAMILIES:
    _register(_family)

"""LoRA on the dense modules of a model, by peft; and the trained model without its adapters.

Source: LoRA (arXiv 2106.09685).
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymoe.config.lora import LoraConfig
from raymoe.models import CheckpointWriter, moe_layers
from raymoe.models.config_file import build_on_meta
from raymoe.models.switch import is_switch_experts

ADAPTER = "default"
"""What peft calls the one adapter that a model has."""


def peft_module() -> Any:
    """The peft package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"lora: peft is needed and cannot be imported ({error}); pip install 'raymoe[lora]'") from None
    return peft


def add_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Freezes a model and puts adapters, which alone are trained, beside its dense modules; those of experts are apart.

    Call it on the model of `load_without_experts`, before `Trainer` takes its dense parameters.

    Args:
        seed: adapters start from it, equal on all ranks, each as no change to its module. The model's dtype is theirs; the
            optimizer keeps float32 masters where it is narrower.

    Raises:
        ValueError: peft is not installed, the family cannot be adapted, or `lora.target_modules` does not fit it.
    """
    family = model.config.model_type
    if is_switch_experts(moe_layers(model)[0].experts):
        raise ValueError(
            f"lora: family '{family}' has experts that are modules of their own, which raymoe does not adapt"
        )
    peft = peft_module()
    model.requires_grad_(False)
    # experts make gradients only where something before them does: the first layer's has nothing trained before it
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    embeddings.register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())
    if not lora.attention:
        return
    targets = _targets(model, lora)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model, ADAPTER)
        except ValueError as error:
            raise ValueError(
                f"lora.target_modules: peft cannot adapt {targets} in family '{family}': {error}"
            ) from None
    if config.target_parameters:
        raise ValueError(
            f"lora.target_modules: in family '{family}' peft takes {targets} for the experts' {sorted(config.target_parameters)};"
            " leave them out, experts have adapters by lora.experts"
        )


def adapted_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Dense modules that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and module.lora_A}


def merged(parameters: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Dense parameters under the names that they have without adapters, weights with W + s B A in W's dtype.

    Args:
        parameters: named as in `model`, whole; those of other modules stay as they are.
    """
    adapted = adapted_modules(model)
    found = {}
    for name, parameter in parameters.items():
        if ".lora_" in name:
            continue
        module, is_base, rest = name.partition(".base_layer.")
        if is_base and rest == "weight" and module in adapted:
            a, b = (parameters[f"{module}.lora_{factor}.{ADAPTER}.weight"] for factor in "AB")
            wide = torch.promote_types(parameter.dtype, torch.float32)
            scaling: Any = adapted[module].scaling
            parameter = torch.addmm(parameter.to(wide), b.to(wide), a.to(wide), alpha=scaling[ADAPTER]).to(
                parameter.dtype
            )
        found[f"{module}.{rest}" if is_base else name] = parameter
    return found


class MergedWriter(CheckpointWriter):
    """Writes a model that `add_adapters` has changed as a plain one, adapters merged into the weights.

    Args:
        path: as for `CheckpointWriter`, as are `options`.
    """

    def __init__(self, path: Path | str, model: PreTrainedModel, *options: Any, **named: Any):
        plain = build_on_meta(copy.deepcopy(model.config), model.dtype)
        plain.generation_config = model.generation_config
        super().__init__(path, plain, *options, **named)
        self._adapted = model

    def add(self, parameters: Mapping[str, Tensor]) -> None:
        """As in `CheckpointWriter`; weights and their adapters come in one call."""
        super().add(merged(parameters, self._adapted))


def _targets(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if lora.target_modules is None:
        targets = sorted({name.rpartition(".")[2] for name in linears if ".self_attn." in name})
        if not targets:
            raise ValueError(
                f"lora.attention: family '{model.config.model_type}' has no linear modules under self_attn; name some in "
                "lora.target_modules, or set attention: false"
            )
        return targets
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            known = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(
                f"lora.target_modules: no linear module is called '{target}'; there are {', '.join(known)}"
            )
    return sorted(lora.target_modules)

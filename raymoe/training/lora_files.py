"""Adapters as peft's directories: adapter_config.json and adapter_model.safetensors.

peft keeps a layer's experts in two tensors a matrix, A [E R, in] expert by expert and B [out, R E] with the expert changing
fastest, and nests its wrappers: the last matrix of an expert lies outermost. E experts, R rank, Q elements of an expert's
adapters.
"""

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.config.lora import LoraConfig
from raymoe.models import MoELayer, moe_layers
from raymoe.training.dense_sharded import whole
from raymoe.training.lora import ADAPTER, adapted_modules, peft_module
from raymoe.training.lora_experts import ExpertAdapters, LoraSparseExperts
from raymoe.training.trainer import Trainer

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# what a peft directory may say beside rank, alpha and targets, and the only value that raymoe computes
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "lora_bias": (False,),
    # the others also change the weights that they are added to
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


class AdapterFiles:
    """The adapters of a peft directory, read piece by piece.

    Raises:
        ValueError: a file is missing or damaged, the adapters are of another kind than raymoe trains, or of other rank, alpha
            or modules than `lora` and the model say; names the field or tensor.
    """

    def __init__(self, path: Path, model: PreTrainedModel, lora: LoraConfig):
        self._path, self._layers = path, moe_layers(model)
        self._adapters = [ExpertAdapters.of(layer, lora) for layer in self._layers]
        self._check_config(lora)
        try:
            self._file = safe_open(path / _WEIGHTS, framework="pt")
            shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path / _WEIGHTS}: cannot be read ({error}); raymoe reads adapters as safetensors"
            ) from None
        self._dense = _dense_names(model)
        wanted = {stored: tuple(model.get_parameter(name).shape) for name, stored in self._dense.items()}
        for layer, adapters in zip(self._layers, self._adapters, strict=True):
            wanted |= _expert_shapes(layer, adapters)
        for name in sorted(wanted.keys() ^ shapes.keys()):
            lacks, what = ("lacks", "has") if name in wanted else ("has", "does not")
            raise ValueError(
                f"{path / _WEIGHTS}: {lacks} '{name}', which a model with these lora settings {what}; set lora.attention, "
                "lora.experts and lora.target_modules to what the adapters were made with"
            )
        for name, shape in wanted.items():
            if shapes[name] != shape:
                raise ValueError(
                    f"{path / _WEIGHTS}: '{name}' has shape {list(shapes[name])}, the model needs {list(shape)}"
                )
        self._layer_tensors = lru_cache(maxsize=1)(self._read_layer)

    def read_dense(self, model: PreTrainedModel) -> None:
        """Fills the adapters of a model's dense modules."""
        with torch.no_grad():
            for name, stored in self._dense.items():
                model.get_parameter(name).copy_(self._file.get_tensor(stored))

    def read_expert(self, layer: int, expert: int, row: Tensor) -> None:
        """Fills `row` [Q] with an expert's adapters."""
        row.zero_()
        tensors = self._layer_tensors(layer)
        for name, view in self._adapters[layer].layout.views(row[None]).items():
            view[0].copy_(tensors[name][expert])

    def _read_layer(self, layer: int) -> dict[str, Tensor]:
        """{`gate_up_proj.A`: [E, R, in], ...}."""
        this, adapters = self._layers[layer], self._adapters[layer]
        return {
            name: _by_expert(self._file.get_tensor(stored), name, this.num_experts)
            for name, stored in _expert_names(this, adapters).items()
        }

    def _check_config(self, lora: LoraConfig) -> None:
        file = self._path / _CONFIG
        try:
            saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: cannot be read ({error})") from None
        for key, values in _PLAIN.items():
            if key in saved and saved[key] not in values:
                raise ValueError(
                    f"{file}: {key} is {saved[key]!r}; raymoe trains adapters with {key} {values[0]!r} alone"
                )
        for key, ours in {"r": "rank", "lora_alpha": "alpha"}.items():
            if saved.get(key) != getattr(lora, ours):
                raise ValueError(
                    f"{file}: {key} is {saved.get(key)}; set lora.{ours} to it, now it is {getattr(lora, ours)}"
                )


def write_adapters(trainer: Trainer, path: Path, lora: LoraConfig, base: str | None = None) -> None:
    """Writes the trained adapters as a directory that `peft.PeftModel.from_pretrained` opens; all ranks call it.

    Rank 0 holds all adapters, and no expert; the directory is whole or as it was before. No dropout is written, for peft has
    none for experts and inference needs none.

    Args:
        base: what peft is to take for the model that the adapters belong to, a Hugging Face directory or name.
    """
    experts = trainer.experts
    assert isinstance(experts, LoraSparseExperts), "its experts have adapters"
    tensors = {}
    for name, stored in _dense_names(trainer.model).items():
        tensor = whole(trainer.model.get_parameter(name).detach(), trainer.dtype)
        tensors[stored] = tensor.cpu().contiguous()
    adapters = experts.trained.adapters
    for layer in trainer.moe_layers if adapters.matrices else ():
        rows = _collect(trainer, experts.trained.parameters, layer)
        if rows is not None:
            views = adapters.layout.views(rows)
            tensors |= {stored: _together(views[name], name) for name, stored in _expert_names(layer, adapters).items()}
    if trainer.world.rank == 0:
        _write(path, tensors, _peft_config(trainer.model, adapters, lora, base))


def _peft_config(model: PreTrainedModel, adapters: ExpertAdapters, lora: LoraConfig, base: str | None) -> Any:
    layer = moe_layers(model)[0]
    # `mlp.experts.gate_up_proj` of `model.layers.3.mlp.experts`
    module = layer.name.partition(f".{layer.decoder_layer}.")[2]
    return peft_module().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules or sorted({name.rpartition(".")[2] for name in adapted_modules(model)}),
        target_parameters=[f"{module}.{field.name}" for field in adapters.matrices] or None,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
    )


def _write(path: Path, tensors: dict[str, Tensor], config: Any) -> None:
    folder = path.with_name(f".{path.name}.{os.getpid()}.partial")
    retired = path.with_name(f".{path.name}.{os.getpid()}.retired")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(folder)
        if path.exists():
            path.rename(retired)
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


def _collect(trainer: Trainer, rows: Tensor, layer: MoELayer) -> Tensor | None:
    """[E, Q] of a layer on rank 0, in the order of the experts."""
    world, slots = trainer.world, trainer.experts.pool.slots
    owners_E = trainer.experts.base.owners[layer.index]
    own = rows[[slots[layer.index, expert] for expert in np.flatnonzero(owners_E == world.rank).tolist()]]
    if world.rank > 0:
        if len(own):
            dist.send(own, group=world.experts, group_dst=0)
        return None
    found = rows.new_empty(len(owners_E), rows.shape[1])
    for rank in range(world.size):
        theirs = np.flatnonzero(owners_E == rank)
        if len(theirs):
            received = own if rank == 0 else rows.new_empty(len(theirs), rows.shape[1])
            if rank > 0:
                dist.recv(received, group=world.experts, group_src=rank)
            found[torch.from_numpy(theirs).to(rows.device)] = received
    return found


def _dense_names(model: PreTrainedModel) -> dict[str, str]:
    """{parameter: its name in a peft directory} of all adapters of dense modules."""
    return {
        f"{module}.lora_{factor}.{ADAPTER}.weight": f"{_PREFIX}{module}.lora_{factor}.weight"
        for module in adapted_modules(model)
        for factor in "AB"
    }


def _expert_names(layer: MoELayer, adapters: ExpertAdapters) -> dict[str, str]:
    """{`gate_up_proj.A`: name in a peft directory}."""
    last = len(adapters.matrices) - 1
    return {
        f"{field.name}.{factor}": f"{_PREFIX}{layer.name}{'.base_layer' * (last - number)}.lora_{factor}.weight"
        for number, field in enumerate(adapters.matrices)
        for factor in "AB"
    }


def _expert_shapes(layer: MoELayer, adapters: ExpertAdapters) -> dict[str, tuple[int, ...]]:
    names = _expert_names(layer, adapters)
    shapes = {}
    for field in adapters.layout.fields:
        first, second = field.shape
        experts = layer.num_experts
        shapes[names[field.name]] = (
            (experts * first, second) if field.name.endswith(".A") else (first, second * experts)
        )
    return shapes


def _by_expert(stored: Tensor, name: str, num_experts: int) -> Tensor:
    """A [E R, in] -> [E, R, in] and B [out, R E] -> [E, out, R]."""
    if name.endswith(".A"):
        return stored.unflatten(0, (num_experts, -1))
    return stored.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def _together(factors: Tensor, name: str) -> Tensor:
    """The inverse of `_by_expert`."""
    rows = factors.flatten(0, 1) if name.endswith(".A") else factors.permute(1, 2, 0).flatten(1)
    return rows.cpu().contiguous()

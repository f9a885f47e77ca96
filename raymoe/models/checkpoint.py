"""Read a Hugging Face checkpoint expert by expert: the dense part into a model, each expert when it is wanted."""

import json
import threading
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from raymoe.models.layers import MoELayer, expert_parameter_names, moe_layers
from raymoe.models.names import CheckpointNames


class _Source(NamedTuple):
    file: Path
    key: str
    part: int
    parts: int


class ExpertFiles:
    """The experts of a checkpoint, one at a time, in the flat form of `ExpertLayout`. Safe to use from several threads."""

    def __init__(
        self, layers: list[MoELayer], dtype: torch.dtype, sources: dict[tuple[str, int | None], list[_Source]]
    ):
        self.layers = layers
        self.dtype = dtype
        self.expert_bytes = max(layer.layout.numel for layer in layers) * dtype.itemsize
        """Of the largest expert, in `dtype`."""
        self._sources = sources
        self._handles: dict[Path, object] = {}
        self._lock = threading.Lock()
        for layer in layers:
            for field in layer.layout.fields:
                self._check_complete(layer, f"{layer.name}.{field.name}")

    @property
    def total_bytes(self) -> int:
        """Of all experts together, in `dtype`."""
        return sum(layer.num_experts * layer.layout.numel for layer in self.layers) * self.dtype.itemsize

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """Fills `out` [numel], contiguous, with one expert, cast to its dtype.

        Returns:
            Bytes read from the file.
        """
        moved_bytes = 0
        this = self.layers[layer]
        for name, view in this.layout.views(out[None]).items():
            parameter = f"{this.name}.{name}"
            fused = self._sources.get((parameter, None))
            if fused is not None:
                tensors = [self._open(fused[0].file).get_slice(fused[0].key)[expert]]
            else:
                tensors = [
                    self._open(source.file).get_tensor(source.key) for source in self._sources[parameter, expert]
                ]
            start = 0
            for tensor in tensors:
                stop = start + tensor.shape[0]
                view[0, start:stop].copy_(tensor)
                start, moved_bytes = stop, moved_bytes + tensor.nbytes
        return moved_bytes

    def _open(self, file: Path):
        with self._lock:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt")
            return self._handles[file]

    def _check_complete(self, layer: MoELayer, parameter: str) -> None:
        if (parameter, None) in self._sources:
            return
        found = {expert: self._sources.get((parameter, expert), []) for expert in range(layer.num_experts)}
        missing = [expert for expert, parts in found.items() if not parts or len(parts) < parts[0].parts]
        if missing:
            raise ValueError(
                f"checkpoint lacks '{parameter}' for expert {missing[0]} ({len(missing)} of {layer.num_experts} missing): "
                "neither a fused tensor nor all those of that expert are in its files"
            )


def load_without_experts(
    path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, ExpertFiles]:
    """Opens a checkpoint with its dense weights in memory and its experts left in the files.

    Args:
        path: a Hugging Face directory with `config.json` and safetensors files.
        dtype: of the model and of the experts as they are read.
        device: where the dense weights go.

    Returns:
        (model in eval mode, whose expert parameters are on the meta device, its experts).

    Raises:
        ValueError: no safetensors there, a tensor is missing, or the family does not follow the experts interface.
    """
    path = Path(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="raymoe")
    layers = moe_layers(model)
    expert_parameters = expert_parameter_names(layers)
    names = CheckpointNames(model)
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    dense: dict[str, Tensor] = {}
    sources: dict[tuple[str, int | None], list[_Source]] = defaultdict(list)
    for file in _weight_files(path):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                target = names.target(key)
                if target.parameter in expert_parameters:
                    sources[target.parameter, target.expert].append(_Source(file, key, target.part, target.parts))
                elif target.parameter in wanted:
                    dense[target.parameter] = handle.get_tensor(key).to(device, wanted[target.parameter].dtype)
    for found in sources.values():
        found.sort(key=lambda source: source.part)
    model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()
    _rebuild_buffers(model, device)
    missing = [n for n, p in model.named_parameters() if p.is_meta and n not in expert_parameters]
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors are missing from its files, the first is '{missing[0]}'")
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model.eval(), ExpertFiles(layers, dtype, dict(sources))


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [path / name for name in names]
    else:
        files = [path / "model.safetensors"]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{path}: no {absent[0]} there; raymoe reads safetensors checkpoints only")
    return files


def _rebuild_buffers(model: PreTrainedModel, device: torch.device | str) -> None:
    """Computes the buffers that no file holds (rotary frequencies and the like), the way the family itself does."""
    for module in model.modules():
        lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer is not None and buffer.is_meta]
        if not lost:
            continue
        for name in lost:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device=device)
        with torch.no_grad():
            model._init_weights(module)

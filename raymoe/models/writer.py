"""Write a Hugging Face checkpoint piece by piece, so that no process ever holds all experts at once."""

import copy
import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raymoe.models import switch
from raymoe.models.checksums import Checksums, write_checksums
from raymoe.models.growing_file import GrowingFile
from raymoe.models.layers import MoELayer, expert_parameter_names, moe_layers
from raymoe.models.names import original_experts, original_tensors

_SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
_FIRST_EXPERT = re.compile(r"(\.experts\.(?:expert_)?)0\.")


class CheckpointWriter:
    """Collects shards in a temporary folder beside `path` and moves them into place at the end: `path` is whole or absent.

    Use as a context manager; leaving it with an exception removes what was written. Leaving it without one before every tensor
    of the model was added is an error, too.

    Args:
        path: the directory to write; one that is there is replaced.
        model: says what there is to write, and the family's names. Its parameters are not read.
        tokenizer: written beside the weights.
        source: a Hugging Face directory whose tokenizer, chat template and generation configuration are copied; `tokenizer`
            goes before them.
        dtype: of the floating-point tensors in the files: one for all, or by name in the files (`ExpertFiles.stored_dtypes`
            for those of the source); None, or a name that is not there: as they are given.
        has_original_names: the family's own names, one expert a tensor in most families; False: a layer's experts fused in
            one tensor, as in the model (what `save_pretrained(save_original_format=False)` writes).
        max_shard_bytes: a file holds no more, unless one tensor does; experts given by `add_experts` are held back up to this.
    """

    def __init__(
        self,
        path: Path | str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        source: Path | str | None = None,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        has_original_names: bool = True,
        max_shard_bytes: int = 2 * 2**30,
    ):
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes: got {max_shard_bytes}; a file must hold at least one byte")
        self._path = Path(path)
        self._model = model
        self._tokenizer = tokenizer
        self._source = None if source is None else Path(source)
        self._dtype = dtype
        self._has_original_names = has_original_names
        self._max_shard_bytes = max_shard_bytes
        self._layers = moe_layers(model)
        self._folder = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        self._shards: list[list[str]] = []
        self._written: set[str] = set()
        self._held: dict[str, Tensor] = {}
        self._growing: dict[str, GrowingFile] = {}
        self._elements: Counter[torch.dtype] = Counter()
        self._checksums: Checksums = {}
        self._total_bytes = 0
        self._ties = _ties(model)
        self._tied_written: set[str] = set()

    def __enter__(self) -> "CheckpointWriter":
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return self

    def add(self, parameters: Mapping[str, Tensor]) -> None:
        """Writes tensors at once, in as many shards as `max_shard_bytes` makes of them.

        Args:
            parameters: named as in the model; a layer's experts are whole: `...experts.gate_up_proj` [E, 2I, H]. A parameter
                that is another one under a second name (a tied `lm_head.weight`) is written once.

        Raises:
            ValueError: a tensor that was written before.
        """
        tensors = self._in_file_names(self._without_ties(parameters))
        shard: dict[str, Tensor] = {}
        shard_bytes = 0
        for name, tensor in tensors.items():
            ready = self._ready(name, tensor)
            if shard and shard_bytes + ready.nbytes > self._max_shard_bytes:
                self._save(shard)
                shard, shard_bytes = {}, 0
            shard[name] = ready
            shard_bytes += ready.nbytes
        self._save(shard)

    def add_experts(self, layer: MoELayer, experts: Mapping[int, Tensor]) -> None:
        """Writes some experts of a layer, in any order; their checksums go beside the weights.

        Where a file holds an expert in tensors of its own, they are held back until they fill a shard; where it holds a layer's
        experts fused, each goes to its place in that layer's file at once.

        Args:
            experts: {expert: flat [layout.numel]} in the form of `ExpertLayout`; copied before the call returns.

        Raises:
            ValueError: an expert that was written before or that the layer does not have.
        """
        outside = [expert for expert in experts if not 0 <= expert < layer.num_experts]
        if outside:
            raise ValueError(f"{layer.name}: no expert {outside[0]}, the layer has {layer.num_experts}")
        for expert, flat in experts.items():
            views = {f"{layer.name}.{name}": view for name, view in layer.layout.views(flat.detach()[None]).items()}
            apart = self._apart(views, [expert])
            if apart is None:
                self._grow(layer, expert, {name: view[0] for name, view in views.items()})
                continue
            for name, tensor in apart.items():
                ready = self._ready(name, tensor)
                self._checksums[name, None] = _crc32(ready)
                is_view = ready.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
                self._held[name] = ready.clone() if is_view else ready
        if sum(tensor.nbytes for tensor in self._held.values()) >= self._max_shard_bytes:
            self._release()

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._release()
                self._check_whole()
                self._finish()
        finally:
            for file in self._growing.values():
                file.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _in_file_names(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name in [name for name in parameters if switch.is_parameter(name)]:
            rows = parameters.pop(name)
            found |= {switch.stored_name(name, expert): row for expert, row in enumerate(rows)}
        return found | (original_tensors(self._model, parameters) if self._has_original_names else parameters)

    def _apart(self, views: dict[str, Tensor], experts: Sequence[int]) -> dict[str, Tensor] | None:
        """The file's tensors of some experts; None where the file holds a layer's experts fused."""
        if self._has_original_names or all(switch.is_parameter(name) for name in views):
            return original_experts(self._model, views, experts)
        return None

    def _grow(self, layer: MoELayer, expert: int, fields: dict[str, Tensor]) -> None:
        rows = {name: self._cast(name, tensor) for name, tensor in fields.items()}
        if layer.name not in self._growing:
            self._claim(rows)
            shapes = {name: ((layer.num_experts, *row.shape), row.dtype) for name, row in rows.items()}
            self._shards.append(list(rows))
            file = self._growing[layer.name] = GrowingFile(self._shard(len(self._shards)), shapes)
            self._total_bytes += file.num_bytes
        for name, row in rows.items():
            self._growing[layer.name].write(name, expert, row)
            self._checksums[name, expert] = _crc32(row)
            self._elements[row.dtype] += row.numel()
        if self._growing[layer.name].is_whole:
            self._growing[layer.name].close()

    def _ready(self, name: str, tensor: Tensor) -> Tensor:
        self._claim([name])
        ready = self._cast(name, tensor)
        self._elements[ready.dtype] += ready.numel()
        return ready

    def _claim(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._written:
                raise ValueError(f"'{name}' was written before; every tensor is added once")
            self._written.add(name)

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        dtype = self._dtype.get(name) if isinstance(self._dtype, Mapping) else self._dtype
        dtype = dtype if tensor.is_floating_point() else None
        return tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()

    def _without_ties(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in parameters.items():
            first = self._ties.get(name)
            if first is not None:
                if first in self._tied_written:
                    continue
                self._tied_written.add(first)
            kept[first or name] = tensor
        return kept

    def _release(self) -> None:
        held, self._held = self._held, {}
        self._save(held)

    def _save(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        self._shards.append(list(tensors))
        self._total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        shard = self._shard(len(self._shards))
        save_file(tensors, shard, metadata={"format": "pt"})
        # safetensors makes files that nobody else may read; who may read the folder may read its files
        shard.chmod(self._folder.stat().st_mode & 0o666)

    def _shard(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"

    def _check_whole(self) -> None:
        partial = next((file for file in self._growing.values() if not file.is_whole), None)
        if partial is not None:
            raise ValueError(
                "{}: '{}' lacks expert {}".format(self._path, *partial.missing()) + "; nothing was written"
            )
        missing = [name for name in self._expected() if name not in self._written]
        if missing:
            raise ValueError(
                f"{self._path}: {len(missing)} tensors of the model were not added, the first is '{missing[0]}'; "
                "nothing was written"
            )

    def _expected(self) -> list[str]:
        """Names in the files of all that the model has, once each."""
        experts = expert_parameter_names(self._layers)
        shapes = {name: tensor.shape for name, tensor in self._model.state_dict().items() if name not in experts}
        dense = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        names = list(self._in_file_names({name: t for name, t in dense.items() if self._ties.get(name, name) == name}))
        for layer in self._layers:
            # the first expert's names stand for all: converting thousands of experts takes transformers many seconds
            first = layer.layout.views(torch.empty(1, layer.layout.numel, device="meta"))
            views = {f"{layer.name}.{name}": view for name, view in first.items()}
            apart = self._apart(views, [0])
            if apart is None:
                names += views
                continue
            names += [
                _FIRST_EXPERT.sub(rf"\g<1>{expert}.", name) for expert in range(layer.num_experts) for name in apart
            ]
        return names

    def _finish(self) -> None:
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self._folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
        if self._model.generation_config is not None:
            self._model.generation_config.save_pretrained(self._folder)
        if self._checksums:
            write_checksums(self._folder, self._checksums)
        self._copy_side_files()
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(self._folder)
        self._write_config()
        retired = self._path.with_name(f".{self._path.name}.{os.getpid()}.retired")
        if self._path.exists():
            self._path.rename(retired)
        self._folder.rename(self._path)
        shutil.rmtree(retired, ignore_errors=True)

    def _copy_side_files(self) -> None:
        if self._source is None:
            return
        for pattern in _SIDE_FILES:
            for file in self._source.glob(pattern):
                if file.is_file():
                    target = self._folder / file.relative_to(self._source)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, target)

    def _write_config(self) -> None:
        config = copy.deepcopy(self._model.config)
        config.architectures = [type(self._model).__name__]
        floating = {dtype: count for dtype, count in self._elements.items() if dtype.is_floating_point}
        config.dtype = max(floating, key=lambda dtype: floating[dtype])
        if getattr(config, "num_nextn_predict_layers", None):
            # transformers builds no multi-token-prediction layers, so none are in the files
            config.num_nextn_predict_layers = 0
        for names_code in ("auto_map", "quantization_config"):
            if hasattr(config, names_code):
                delattr(config, names_code)
        config.save_pretrained(self._folder)


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _ties(model: PreTrainedModel) -> dict[str, str]:
    """{name: the first name of the same parameter}, for parameters that go by several."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[name] = first.setdefault(id(parameter), name)
    shared = Counter(found.values())
    return {name: original for name, original in found.items() if shared[original] > 1}

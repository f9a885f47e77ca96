"""Read a Hugging Face checkpoint expert by expert: the dense part into a model, each expert when it is wanted."""

import hashlib
import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from raymoe.models.byte_ranges import RangeReader
from raymoe.models.config_file import build_on_meta, one_line, read_config
from raymoe.models.families import open_parts
from raymoe.models.landing import Landing, TensorReadError
from raymoe.models.layers import MoELayer, expert_parameter_names, moe_layers
from raymoe.models.names import CheckpointNames
from raymoe.models.tensor_files import Span
from raymoe.models.weight_files import WeightFiles, quantization_of

_log = logging.getLogger(__name__)

_SAMPLED_EXPERTS, _SAMPLED_BYTES = 256, 1024
_BLOCK_NUMBER = re.compile(r"\blayers\.(\d+)\.")


class _Source(NamedTuple):
    name: str
    part: int
    parts: int


_Sources = dict[tuple[str, int | None], list[_Source]]
"""By (`...experts.gate_up_proj`, expert), the expert being None where one tensor holds them all."""


class _Part(NamedTuple):
    """A tensor in the files, or a row of it, and where it begins in the flat expert, in elements."""

    name: str
    start: int
    spans: tuple[Span, ...]

    @property
    def is_plain(self) -> bool:
        """Its bytes are the expert's, but for a cast."""
        return len(self.spans) == 1 and self.spans[0].is_aligned


class ExpertFiles:
    """The experts of a checkpoint, one at a time, in the flat form of `ExpertLayout`. Safe to use from several threads."""

    def __init__(
        self, layers: list[MoELayer], dtype: torch.dtype, files: WeightFiles, sources: _Sources, left_out: list[str]
    ):
        self.layers = layers
        self.dtype = dtype
        self.expert_bytes = max(layer.layout.numel for layer in layers) * dtype.itemsize
        """Of the largest expert, in `dtype`."""
        self.left_out = tuple(left_out)
        """Tensors in the files that the model does not take: multi-token-prediction layers, buffers that it computes."""
        self.stored_dtypes = files.dtypes
        """Of the tensors in the files, by their names there; without those that were quantised."""
        self.is_fused = any(expert is None for _, expert in sources)
        """A layer's experts are one tensor in the files, not one or more tensors each."""
        self._files = files
        self._sources = sources
        self._parts: dict[tuple[int, int], list[_Part]] = {}
        for layer in layers:
            for field in layer.layout.fields:
                self._check(layer, f"{layer.name}.{field.name}", field.shape)

    @property
    def total_bytes(self) -> int:
        """Of all experts together, in `dtype`."""
        return sum(layer.num_experts * layer.layout.numel for layer in self.layers) * self.dtype.itemsize

    @property
    def reader(self) -> RangeReader:
        """What reads the files: how it does (`mode`) and what it has read (`counters`)."""
        return self._files.reader

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """Fills `out` [numel], contiguous, with one expert, cast to its dtype; quantised ones are dequantised.

        Parts that lie side by side in a file come with one request. After an error `out` holds anything. Checksums, where the
        directory has some (`CheckpointWriter` writes them), are compared the first time that an expert is read: afterwards they
        would cost more than the reading.

        Returns:
            Bytes that the expert takes in the files.

        Raises:
            TensorReadError: they cannot be read, or are not what was written; names the file, the tensor and the expert.
        """
        parts = self._parts_of(layer, expert)
        landings: list[Landing] = []
        codes: list[tuple[_Part, list[Tensor]]] = []
        for part in parts:
            span = part.spans[0]
            if part.is_plain:
                landings.append(span.into(out[part.start : part.start + span.numel]))
                continue
            pieces = [torch.empty(span.num_bytes, dtype=torch.uint8) for span in part.spans]
            landings += [span.into(piece) for span, piece in zip(part.spans, pieces, strict=True)]
            codes.append((part, pieces))
        try:
            moved_bytes = self.reader.read(landings)
        except TensorReadError as error:
            raise TensorReadError(f"expert {expert} of {self.layers[layer].name}: {error}") from error
        for part, raw in codes:
            pieces = [piece.view(s.dtype).view(s.shape) for s, piece in zip(part.spans, raw, strict=True)]
            weight = self._files.weight(part.name, pieces)
            out[part.start : part.start + weight.numel()].view(weight.shape).copy_(weight)
        if parts[0].spans[0].crc32 is not None:
            self._parts[layer, expert] = [
                part._replace(spans=tuple(s._replace(crc32=None) for s in part.spans)) for part in parts
            ]
        return moved_bytes

    def probe(self, layer: int, expert: int, num_bytes: int) -> None:
        """Reads the first bytes of an expert and lets them go: to measure what the device does with a request that small."""
        span = self._parts_of(layer, expert)[0].spans[0]
        self.reader.probe(span.file, span.start, min(num_bytes, span.num_bytes))

    def fingerprint(self) -> str:
        """Says whether two checkpoints hold the same experts: a hash of names, kinds and shapes of their tensors, of the checksums
        where the directory has some, and of some bytes out of 256 experts, evenly spread.

        Raises:
            TensorReadError: they cannot be read.
        """
        found = hashlib.sha256()
        everyone = [(layer.index, expert) for layer in self.layers for expert in range(layer.num_experts)]
        looked_at = set(everyone[:: max(1, len(everyone) // _SAMPLED_EXPERTS)])
        for key in everyone:
            for part in self._find_parts(self.layers[key[0]], key[1]):
                for span in part.spans:
                    found.update(f"{span.name} {span.dtype} {span.shape} {span.crc32}\n".encode())
                    if key in looked_at:
                        taken = torch.empty(min(span.num_bytes, _SAMPLED_BYTES), dtype=torch.uint8)
                        middle = (span.num_bytes - len(taken)) // 2
                        self.reader.read([Landing(span.file, span.start + middle, torch.uint8, taken, span.name)])
                        found.update(taken.numpy().data)
        return found.hexdigest()

    def _parts_of(self, layer: int, expert: int) -> list[_Part]:
        found = self._parts.get((layer, expert))
        if found is None:
            found = self._parts[layer, expert] = self._find_parts(self.layers[layer], expert)
        return found

    def _find_parts(self, layer: MoELayer, expert: int) -> list[_Part]:
        parts = []
        for field in layer.layout.fields:
            parameter = f"{layer.name}.{field.name}"
            fused = self._sources.get((parameter, None))
            start = field.offset
            for source in fused or self._sources[parameter, expert]:
                spans = self._files.spans(source.name, expert if fused else None)
                parts.append(_Part(source.name, start, spans))
                start += field.numel // source.parts
        return parts

    def _check(self, layer: MoELayer, parameter: str, shape: tuple[int, ...]) -> None:
        """Every expert is there, whole, and of the shape that the configuration says."""
        fused = self._sources.get((parameter, None))
        if fused is not None:
            self._check_shape(fused[0], (layer.num_experts, *shape))
            return
        found = {expert: self._sources.get((parameter, expert), []) for expert in range(layer.num_experts)}
        missing = [expert for expert, parts in found.items() if not parts or len(parts) < parts[0].parts]
        if missing:
            raise ValueError(
                f"checkpoint lacks '{parameter}' for expert {missing[0]} ({len(missing)} of {layer.num_experts} missing): "
                "neither a fused tensor nor all those of that expert are in its files"
            )
        for parts in found.values():
            for source in parts:
                self._check_shape(source, (shape[0] // source.parts, *shape[1:]))

    def _check_shape(self, source: _Source, wanted: tuple[int, ...]) -> None:
        _check_shape(self._files, source.name, wanted)


def load_without_experts(
    path: Path | str, dtype: torch.dtype | None, device: torch.device | str = "cpu", *, direct_io: bool = False
) -> tuple[PreTrainedModel, ExpertFiles]:
    """Opens a checkpoint with its dense weights in memory and its experts left in the files.

    FP8 weights in blocks (DeepSeek-V3 and others) and MXFP4 experts (gpt-oss) are dequantised as they are read.
    Multi-token-prediction layers are left out, with a note in the log; `ExpertFiles.left_out` names their tensors, and
    `CheckpointWriter` writes a configuration without them.

    Args:
        path: a Hugging Face directory with `config.json` and safetensors files.
        dtype: of the model and of the experts as they are read; None: what config.json says, or else the files' own.
        device: where the dense weights go.
        direct_io: read past the page cache, now and whenever an expert is wanted, see `raymoe.models.byte_ranges`.

    Returns:
        (model in eval mode, whose expert parameters are on the meta device, its experts).

    Raises:
        ValueError: no safetensors there, a file is damaged, a tensor is missing, unknown or of another shape than the
            configuration says, a quantisation that raymoe does not read, or the family has no experts that raymoe can reach.
    """
    path = Path(path)
    config = read_config(path / "config.json")
    quantization = quantization_of(config)
    if quantization is not None:
        del config.quantization_config
    files = WeightFiles(path, quantization, direct_io=direct_io)
    chosen = dtype or config.dtype or next(iter(files.dtypes.values()), torch.float32)
    assert isinstance(chosen, torch.dtype)
    model = build_on_meta(config, chosen, experts_implementation="raymoe")
    layers = moe_layers(model)
    sources, left_out, dense = _sort(model, layers, files, path)
    experts = ExpertFiles(layers, chosen, files, sources, left_out)
    kept_fp32 = set(model._keep_in_fp32_modules_strict or ())
    state = {}
    for parameter, (name, wanted) in dense.items():
        is_fp32 = wanted.is_floating_point() and not kept_fp32.isdisjoint(parameter.split("."))
        state[parameter] = files.read(name)[0].to(device, torch.float32 if is_fp32 else wanted.dtype)
    _check_ties(model, state, path)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    _rebuild_buffers(model, device)
    expert_parameters = expert_parameter_names(layers)
    missing = [n for n, p in model.named_parameters() if p.is_meta and n not in expert_parameters]
    missing += [n for n in sorted(model.state_dict().keys() & dict(model.named_buffers()).keys()) if n not in state]
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors are missing from its files, the first is '{missing[0]}'")
    if (path / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:
            raise ValueError(
                f"{path / 'generation_config.json'}: transformers cannot read it: {one_line(error)}"
            ) from None
    open_parts(model, path)
    return model.eval(), experts


def _sort(
    model: PreTrainedModel, layers: list[MoELayer], files: WeightFiles, path: Path
) -> tuple[_Sources, list[str], dict[str, tuple[str, Tensor]]]:
    """Where each tensor of the files goes: (the experts' sources, those left out, {dense parameter: (name, meta tensor)})."""
    names = CheckpointNames(model)
    num_experts = {f"{layer.name}.{field.name}": layer.num_experts for layer in layers for field in layer.layout.fields}
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    sources: _Sources = defaultdict(list)
    dense: dict[str, tuple[str, Tensor]] = {}
    unknown, left_out = [], []
    for name, shape in files.shapes.items():
        if _is_left_out(name, model):
            left_out.append(name)
            continue
        target = names.target(name)
        if target.parameter in num_experts:
            if target.expert is not None and target.expert >= num_experts[target.parameter]:
                raise ValueError(
                    f"{path}: '{name}' in {files.file_of(name)} is expert {target.expert}, but by config.json a layer has "
                    f"{num_experts[target.parameter]} experts; the two do not belong together"
                )
            sources[target.parameter, target.expert].append(_Source(name, target.part, target.parts))
        elif target.parameter in wanted:
            _check_shape(files, name, tuple(wanted[target.parameter].shape))
            dense[target.parameter] = (name, wanted[target.parameter])
        else:
            unknown.append(f"'{name}' {list(shape)} in {files.file_of(name)}")
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} tensors have no place in the model that config.json describes "
            f"({type(model).__name__}), the first is {unknown[0]}. Correct config.json (its numbers of layers and experts, "
            "its model_type) or take them out of the files; raymoe does not drop them silently."
        )
    for found in sources.values():
        found.sort(key=lambda source: source.part)
    if left_out:
        _log.warning(
            "%s: %d tensors are left out, for the model computes without them: '%s'%s", path, len(left_out), left_out[0],
            " and more" if len(left_out) > 1 else "",
        )  # fmt: skip
    return dict(sources), left_out, dense


def _is_left_out(name: str, model: PreTrainedModel) -> bool:
    """A multi-token-prediction layer, a rotary table of old files, or what the family's own class says it ignores."""
    if name.endswith("rotary_emb.inv_freq") or _is_prediction_layer(name, model.config.get_text_config()):
        return True
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def _is_prediction_layer(name: str, text: PretrainedConfig) -> bool:
    """Source: DeepSeek-V3 releases number their multi-token-prediction layers after the last block."""
    number = _BLOCK_NUMBER.search(name)
    num_blocks = text.num_hidden_layers
    extra = getattr(text, "num_nextn_predict_layers", None) or 0
    return number is not None and num_blocks <= int(number[1]) < num_blocks + extra


def _check_shape(files: WeightFiles, name: str, wanted: tuple[int, ...]) -> None:
    found = files.shapes[name]
    if found != wanted:
        raise ValueError(
            f"tensor '{name}' in {files.file_of(name)} has shape {list(found)}, but by config.json it is {list(wanted)}"
        )


def _check_ties(model: PreTrainedModel, state: dict[str, Tensor], path: Path) -> None:
    """A file may hold a tied weight under both names, but only once in value: the model would drop the other."""
    for second, first in model.all_tied_weights_keys.items():
        if second in state and first in state and not torch.equal(state[second], state[first]):
            raise ValueError(
                f"{path}: config.json ties '{second}' to '{first}', but the files hold two different tensors; set "
                "tie_word_embeddings: false in config.json, or take one of them out"
            )


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

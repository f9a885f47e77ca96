"""Write a Hugging Face checkpoint piece by piece, so that no process ever holds all experts at once."""

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raymoe.models.names import revert_weight_conversion


class CheckpointWriter:
    """Collects shards in a temporary folder beside `path` and moves them into place at the end: `path` is whole or absent.

    Use as a context manager; leaving it with an exception removes what was written.
    """

    def __init__(self, path: Path | str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        self._path = Path(path)
        self._model = model
        self._tokenizer = tokenizer
        self._folder = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def __enter__(self) -> "CheckpointWriter":
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return self

    def add(self, parameters: dict[str, Tensor]) -> None:
        """Writes one shard. `parameters` are named as in the model; the file gets the family's original names."""
        original = revert_weight_conversion(self._model, _without_ties(parameters))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in original.items()}
        if not tensors:
            return
        self._shards.append(list(tensors))
        self._total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, self._shard(len(self._shards)), metadata={"format": "pt"})

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _shard(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"

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
        config = self._model.config
        config.architectures = [type(self._model).__name__]
        config.save_pretrained(self._folder)
        if self._model.generation_config is not None:
            self._model.generation_config.save_pretrained(self._folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(self._folder)
        retired = self._path.with_name(f".{self._path.name}.{os.getpid()}.retired")
        if self._path.exists():
            self._path.rename(retired)
        self._folder.rename(self._path)
        shutil.rmtree(retired, ignore_errors=True)


def _without_ties(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters without those that are another one under a second name, e.g. a tied `lm_head.weight`."""
    kept: dict[tuple, tuple[str, Tensor]] = {}
    for name, tensor in parameters.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        kept.setdefault(place, (name, tensor))
    return dict(kept.values())

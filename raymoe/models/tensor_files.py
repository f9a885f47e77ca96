"""The safetensors files of a Hugging Face directory as one table of tensors, opened once and read piece by piece."""

import json
import threading
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from raymoe.models.config_file import one_line

_INDEX = "model.safetensors.index.json"


class TensorEntry(NamedTuple):
    """Where a tensor lies and what it is, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, F8_E4M3, U8, ..."""


class TensorFiles:
    """Every tensor of a directory by name. Safe to use from several threads.

    Raises:
        ValueError: no safetensors there, or the index and the files contradict each other, or a file is damaged; names it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, TensorEntry] = {}
        self._handles: dict[Path, safe_open] = {}
        self._lock = threading.Lock()
        index = _read_index(path)
        for file in sorted(set(index.values())) if index else ["model.safetensors"]:
            self._add_file(path / file)
        for key, file in index.items():
            if key not in self.entries or self.entries[key].file.name != file:
                raise ValueError(f"{path / _INDEX}: says that {file} holds '{key}', but it does not; fetch both again")

    def read(self, key: str) -> Tensor:
        """A whole tensor, on the CPU."""
        try:
            return self._handle(self.entries[key].file).get_tensor(key)
        except SafetensorError as error:
            raise self._damaged(key, error) from None

    def read_row(self, key: str, row: int) -> Tensor:
        """`tensor[row]`, reading no more than that."""
        try:
            return self._handle(self.entries[key].file).get_slice(key)[row]
        except SafetensorError as error:
            raise self._damaged(key, error) from None

    def _add_file(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"{file.parent}: no {file.name} there; raymoe reads safetensors checkpoints only")
        try:
            handle = self._handle(file)
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                if key in self.entries:
                    raise ValueError(
                        f"{file.parent}: '{key}' is in {self.entries[key].file.name} and again in {file.name}; "
                        "remove one of the two"
                    )
                piece = handle.get_slice(key)
                self.entries[key] = TensorEntry(file, tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: not a whole safetensors file ({one_line(error)}); it was cut short or damaged, fetch it again"
            ) from None

    def _handle(self, file: Path):
        with self._lock:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt")
            return self._handles[file]

    def _damaged(self, key: str, error: Exception) -> ValueError:
        return ValueError(f"{self.entries[key].file}: tensor '{key}' cannot be read: {one_line(error)}")


def _read_index(path: Path) -> dict[str, str]:
    """{tensor: file name}; empty if the directory has no index."""
    file = path / _INDEX
    if not file.is_file():
        return {}
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not readable as JSON: {one_line(error)}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{file}: no 'weight_map' of tensor names to file names in it; fetch it again")
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise ValueError(f"{file}: '{outside[0]}' is not the name of a file in that directory")
    return weight_map

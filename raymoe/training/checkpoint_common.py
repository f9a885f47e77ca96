"""The small values of a checkpoint as JSON, with a npz file beside it for the arrays."""

import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from raymoe.training.checkpoint_state import CheckpointError

COMMON, ARRAYS = "common.json", "common.npz"
_ARRAY = "__array__"


def encode_common(values: dict[str, object]) -> dict[str, bytes]:
    """Contents of the two files, the same bytes for equal values.

    Raises:
        ValueError: a value is neither JSON nor a numeric numpy array; names its key.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = _to_json(values, "common", arrays)
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **arrays)
    return {COMMON: json.dumps(tree, indent=1).encode(), ARRAYS: packed.getvalue()}


def common_digests(values: dict[str, object]) -> dict[str, int]:
    """A checksum of each value, to compare ranks."""
    digests = {}
    for key, value in values.items():
        arrays: dict[str, np.ndarray] = {}
        text = json.dumps(_to_json(value, f"common.{key}", arrays))
        for name, array in arrays.items():
            text += f"{name} {array.dtype} {array.shape} {zlib.crc32(array.tobytes())}"
        digests[key] = zlib.crc32(text.encode())
    return digests


def decode_common(path: Path) -> dict[str, object]:
    """Reads the two files of the checkpoint `path`. Raises: CheckpointError, naming the file."""
    try:
        tree = json.loads((path / COMMON).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / COMMON}: cannot be read: {error}") from None
    try:
        with np.load(path / ARRAYS, allow_pickle=False) as packed:
            arrays = {name: packed[name] for name in packed.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path / ARRAYS}: cannot be read: {error}") from None
    values = _from_json(tree, arrays)
    assert isinstance(values, dict)
    return values


def _to_json(value: object, where: str, arrays: dict[str, np.ndarray]) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{number}]", arrays) for number, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == _ARRAY:
                raise ValueError(f"{where}: key {key!r} cannot be saved; keys must be strings, other than {_ARRAY!r}")
        return {key: _to_json(item, f"{where}.{key}", arrays) for key, item in value.items()}
    kind = f"{type(value).__name__} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise ValueError(f"{where}: {kind} cannot be saved; give numbers, strings, lists, dicts or numeric numpy arrays")


def _from_json(value: object, arrays: dict[str, np.ndarray]) -> object:
    if isinstance(value, dict):
        if _ARRAY in value:
            return arrays[value[_ARRAY]]
        return {key: _from_json(item, arrays) for key, item in value.items()}
    return [_from_json(item, arrays) for item in value] if isinstance(value, list) else value

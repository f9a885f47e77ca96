"""Loading a training checkpoint on any number of ranks."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state

from raymoe.training.checkpoint_common import ARRAYS, COMMON, decode_common
from raymoe.training.checkpoint_folder import Manifest
from raymoe.training.checkpoint_state import (
    CheckpointError,
    Loaded,
    Signature,
    TrainState,
    dense_key,
    expert_keys,
    own_key,
    signature,
)
from raymoe.training.checkpoint_storage import METADATA, TensorReader

# every rank plans and reads for itself on purpose: loading needs no plan of all
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_NAMED = 3

T = TypeVar("T")


def read_common(path: Path) -> dict[str, object]:
    """The `common()` values of a checkpoint, numpy arrays and all; reads no tensor.

    Raises:
        CheckpointError: no complete checkpoint, or a damaged file, by name.
    """
    manifest = Manifest.read(path)
    manifest.check_files(path)
    for name in (COMMON, ARRAYS):
        manifest.read_file(path, name)
    return decode_common(path)


def load(path: Path, state: TrainState, *, rank: int, size: int, group: dist.ProcessGroup | None) -> Loaded:
    """Fills the live tensors of `state`, bit for bit; all ranks call it. Each rank reads what it asks for, once.

    Args:
        group: all ranks of now, to agree on errors; default: all.

    Raises:
        CheckpointError: on every rank, with the file and the tensor, if the checkpoint is damaged, partial or of another
            model. Missing and mismatched tensors are found before any is filled; bytes are checked as they are read, so a
            damaged one leaves a state of which some is old: load another checkpoint or stop.
    """
    exchange = _Exchange(size, group)

    def prepare() -> tuple[Manifest, Metadata, dict[str, object], dict[str, Tensor]]:
        manifest = Manifest.read(path)
        manifest.check_files(path)
        metadata = _read_metadata(path, manifest)
        for name in (COMMON, ARRAYS):
            manifest.read_file(path, name)
        wanted = {dense_key(name): tensor for name, tensor in state.dense().items()} | expert_keys(state.experts())
        _compare(path, metadata, wanted)
        return manifest, metadata, decode_common(path), wanted

    manifest, metadata, common, wanted = exchange.together(prepare)
    asked = set().union(*exchange.gather(list(wanted)))
    unasked = sorted(key for key in metadata.state_dict_metadata.keys() - asked if not key.startswith("own/"))
    if unasked:
        raise CheckpointError(
            f"{path}: holds {_some(unasked)}, which this run does not have: it is of another model or configuration"
        )
    own_by_name = state.own()
    own = {own_key(rank, name): tensor for name, tensor in own_by_name.items()}
    saved_own = {
        key: _saved(value) for key, value in metadata.state_dict_metadata.items() if key.startswith(own_key(rank, ""))
    }
    fits = manifest.size == size and saved_own == {key: signature(tensor) for key, tensor in own.items()}
    own_restored = all(exchange.gather(fits))
    if own_restored:
        wanted |= own
    exchange.together(lambda: _read(path, metadata, wanted))
    return Loaded(manifest.step, manifest.size, own_restored, own_by_name if own_restored else {}, common)


class _LivePlanner(DefaultLoadPlanner):
    """Plans reads into live tensors."""

    def __init__(self, wanted: dict[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._wanted = wanted

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # past dcp.load and the base class, which look for modules and meta tensors in every entry they are given
        super().set_up_planner({}, metadata, is_coordinator)
        self.state_dict = self._wanted


class _Exchange:
    """What the ranks tell each other during a load."""

    def __init__(self, size: int, group: dist.ProcessGroup | None):
        self._size, self._group = size, group

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        values: list[Any] = [value]
        if self._size > 1:
            values = [None] * self._size
            dist.all_gather_object(values, value, group=self._group)
        return values

    def together(self, function: Callable[[], T]) -> T:
        """What `function` returns, or on every rank the error of the first rank that has one."""
        result, error = None, None
        try:
            result = function()
        # whatever it is, the others must not wait for this rank
        except Exception as found:
            error = found
        text = None if error is None else str(error) if isinstance(error, CheckpointError) else repr(error)
        errors = [text for text in self.gather(text) if text is not None]
        if errors:
            raise CheckpointError(errors[0]) from error
        return cast(T, result)


def _read_metadata(path: Path, manifest: Manifest) -> Metadata:
    content = manifest.read_file(path, METADATA)
    try:
        return pickle.loads(content)
    except Exception as error:
        raise CheckpointError(
            f"{path / METADATA}: written by a version of torch that this one cannot read: {type(error).__name__}: {error}"
        ) from None


def _compare(path: Path, metadata: Metadata, wanted: dict[str, Tensor]) -> None:
    saved = {key: _saved(value) for key, value in metadata.state_dict_metadata.items()}
    missing = [key for key in wanted if key not in saved]
    if missing:
        raise CheckpointError(f"{path}: does not hold {_some(missing)}: it is partial, or of another model")
    for key, tensor in wanted.items():
        if signature(tensor) != saved[key]:
            (have_shape, have_dtype), (shape, dtype) = saved[key], signature(tensor)
            raise CheckpointError(
                f"{path}: {key} is {dtype} {list(shape)} in this run, but {have_dtype} {list(have_shape)} in the checkpoint: "
                "it is of another model or precision"
            )


def _saved(value: Any) -> Signature:
    assert isinstance(value, TensorStorageMetadata), "only tensors are saved"
    return tuple(value.size), str(value.properties.dtype)


def _some(keys: list[str]) -> str:
    rest = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + rest


def _read(path: Path, metadata: Metadata, wanted: dict[str, Tensor]) -> None:
    try:
        load_state({}, storage_reader=TensorReader(path, metadata), planner=_LivePlanner(wanted), no_dist=True)
    # not an Exception: torch derives it from BaseException
    except CheckpointException as failure:
        error = next(error for error, _ in failure.failures.values())
        raise (
            error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: cannot be read: {error}")
        ) from None

"""Storage of torch.distributed.checkpoint: one file a rank, the bytes of its tensors one after another, each with a checksum.

DCP's own file format wraps each tensor in an archive (torch.save): about 0.6 ms of interpreter time a tensor in either
direction, in which the training thread stands still. Here it is about 0.15 ms, most of it DCP's planning, which stays
DCP's, like resharding.
"""

import os
import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from raymoe.training.checkpoint_state import CheckpointError

METADATA = "metadata.pickle"


class StoredTensor(NamedTuple):
    """Where the bytes of one tensor, or of one rank's part of it, lie."""

    file: str
    offset: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class FileRecord:
    """What a file of a checkpoint must be."""

    num_bytes: int
    crc32: int | None
    """Of the whole file; None where each tensor in it has a checksum of its own."""


class StagedPlanner(DefaultSavePlanner):
    """Plans a save of tensors whose values were copied to host memory before.

    Args:
        state: what is planned: host tensors, and DTensors for their shape and layout alone.
        parts: this rank's part of each DTensor, in host memory.
    """

    def __init__(self, state: dict[str, Tensor], parts: dict[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged, self._parts = state, parts

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        # past dcp.save, which wraps every entry of a state dict it is given in a logger
        super().set_up_planner(self._staged, storage_meta, is_coordinator)

    def lookup_object(self, index: MetadataIndex) -> Any:
        part = self._parts.get(index.fqn)
        return super().lookup_object(index) if part is None else part


class TensorWriter(StorageWriter):
    """Writes this rank's planned tensors to `tensors-<rank>.bin`, and on rank 0 the metadata; all are synchronised to disk."""

    def __init__(self, path: Path, rank: int):
        self._path, self._rank = path, rank
        self.files: dict[str, FileRecord] = {}
        """What this rank has written."""

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"tensors-{self._rank:05d}.bin"
        results = []
        with open(self._path / name, "wb") as file:
            for item in plan.items:
                results.append(_write(file, name, item, planner))
            self.files[name] = FileRecord(file.tell(), None)
            file.flush()
            os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        # plain tuples: a checkpoint outlives the names of our classes
        metadata.storage_data = {result.index: tuple(result.storage_data) for rank in results for result in rank}
        content = pickle.dumps(metadata)
        self.files[METADATA] = FileRecord(len(content), zlib.crc32(content))
        write_synced(self._path / METADATA, content)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class TensorReader(StorageReader):
    """Reads what `TensorWriter` wrote; no tensor is filled before its bytes have been found to be those that were written."""

    def __init__(self, path: Path, metadata: Metadata):
        self._path, self._metadata = path, metadata

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return LoadPlan(sorted(plan.items, key=lambda item: self._stored(item)[:2]))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._stored(item).file, []).append(item)
        scratch = np.empty(max((self._stored(item).num_bytes for item in plan.items), default=0), dtype=np.uint8)
        for name, items in by_file.items():
            with open(self._path / name, "rb", buffering=0) as file:
                for item in items:
                    self._read(file, item, planner, scratch)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _stored(self, item: ReadItem) -> StoredTensor:
        return StoredTensor(*self._metadata.storage_data[item.storage_index])

    def _read(self, file: Any, item: ReadItem, planner: LoadPlanner, scratch: np.ndarray) -> None:
        stored, name = self._stored(item), item.storage_index.fqn
        content = scratch[: stored.num_bytes].data
        file.seek(stored.offset)
        done = 0
        # a raw file may give less than asked, at most 2 GiB at a time
        while done < len(content) and (count := file.readinto(content[done:])):
            done += count
        if done < len(content):
            raise CheckpointError(f"{file.name}: truncated: it ends within the tensor {name}")
        if zlib.crc32(content) != stored.crc32:
            raise CheckpointError(f"{file.name}: damaged: the checksum of the tensor {name} does not match its bytes")
        saved = self._metadata.state_dict_metadata[name]
        chunk = next(c for c in saved.chunks if item.storage_index.offset in (None, c.offsets))
        target = planner.resolve_tensor(item).detach()
        if not stored.num_bytes:
            return
        source = torch.from_numpy(scratch[: stored.num_bytes]).view(saved.properties.dtype).view(chunk.sizes)
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            source = source.narrow(dim, start, length)
        target.copy_(source)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def write_synced(path: Path, content: bytes) -> None:
    """A file whose content is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write(file: Any, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), "only tensors are planned"
    assert tensor.is_contiguous(), "copies in host memory are"
    content = tensor.reshape(-1).view(torch.uint8).numpy().data
    offset = file.tell()
    file.write(content)
    return WriteResult(item.index, len(content), StoredTensor(name, offset, len(content), zlib.crc32(content)))

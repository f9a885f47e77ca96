"""Checkpoints of a training run: saved behind the training's back, committed whole or not at all.

All ranks save together, through torch.distributed.checkpoint: each writes the experts it keeps and its share of the dense
tensors. A save counts from the moment in which its directory gets its name; until then the ones before it stay as they are.
"""

import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.tensor import DTensor

from raymoe.training import checkpoint_folder as folders
from raymoe.training.checkpoint_common import common_digests, encode_common
from raymoe.training.checkpoint_folder import Manifest, WriteLock, latest
from raymoe.training.checkpoint_load import load, read_common
from raymoe.training.checkpoint_stage import HostStage
from raymoe.training.checkpoint_state import (
    CheckpointError,
    Loaded,
    SaveError,
    Signature,
    TrainState,
    dense_key,
    expert_keys,
    local_part,
    own_key,
    signature,
)
from raymoe.training.checkpoint_storage import FileRecord, StagedPlanner, TensorWriter, write_synced
from raymoe.training.world import new_group

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Loaded",
    "SaveError",
    "TrainState",
    "latest",
    "load",
    "read_common",
    "resume_path",
]

T = TypeVar("T")


def resume_path(folder: Path, resume: Path | Literal["latest", "never"]) -> Path | None:
    """The checkpoint a run starts from, or None if it starts anew; before any is loaded.

    Raises:
        ValueError: `never`, and the folder holds checkpoints of an earlier run.
    """
    if isinstance(resume, Path):
        return resume
    newest = latest(folder)
    if resume == "never" and newest is not None:
        raise ValueError(
            f"{folder}: holds checkpoints of an earlier run, up to {newest.name}; resume from it, or give another folder"
        )
    return newest


@dataclass(frozen=True)
class _Header:
    """What the ranks compare before they write."""

    step: int
    dense: dict[str, Signature]
    experts: dict[str, Signature]
    common: dict[str, int]


class Checkpointer:
    """Saves the states of one run into `folder`, which all ranks see; every rank makes one, and calls it in the same order.

    One a process and folder: close it before the next one, also when a rank was lost and the ranks form anew. After a loss
    destroy the process groups first: a save that waits for the lost rank ends by that, with an error.

    Args:
        group: a gloo group of all ranks, for nothing else; default: a new one, which all ranks make here together.
        keep: so many of the newest complete checkpoints stay.
        resumed_step: step from which the run goes on, if later ones lie in the folder: they are no longer part of it, and
            go when the next save is committed. By default a step must be later than all that are there.
        run: whose ranks may form anew while one that hangs still has the folder; default: each is a run of its own.

    Raises:
        ValueError: another run writes into the folder, or `keep` is below 1.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        size: int,
        group: dist.ProcessGroup | None,
        keep: int = 3,
        resumed_step: int | None = None,
        run: str | None = None,
    ):
        if keep < 1:
            raise ValueError(f"keep: at least 1 checkpoint must stay, got {keep}")
        self._folder, self._rank, self._size, self._keep = folder, rank, size, keep
        self._run = run
        self._own_group = new_group(backend="gloo") if group is None and size > 1 else None
        self._group = group or self._own_group
        self._stage = HostStage()
        self._lock: WriteLock | None = None
        # also a barrier: whoever had the lock before has closed by now
        self._gather(None)
        steps = self._on_first(self._open)
        self._superseded = {step for step in steps if resumed_step is not None and step > resumed_step}
        self._newest = max(steps - self._superseded, default=-1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def save(self, step: int, state: TrainState) -> None:
        """Returns once the state is copied to host memory; the write goes on behind, at most one at a time.

        Raises:
            ValueError: the step is not later than the newest checkpoint, or `common()` holds what cannot be saved.
            SaveError: the save before failed; this one has not begun.
        """
        self.wait()
        if step <= self._newest:
            raise ValueError(
                f"{self._folder}: step {step} cannot be saved: the checkpoint of step {self._newest} is there already; "
                "resume from it, or give another folder"
            )
        dense, common = state.dense(), state.common()
        experts = expert_keys(state.experts())
        header = _Header(step, _signatures(dense), _signatures(experts), common_digests(common))
        files = encode_common(common)
        mine = _share_of(dense, self._rank, self._size)
        tensors = {dense_key(name): dense[name] for name in mine} | experts
        tensors |= {own_key(self._rank, name): tensor for name, tensor in state.own().items()}
        copies = self._stage.copy({key: local_part(tensor) for key, tensor in tensors.items()})
        planned = {key: tensor if isinstance(tensor, DTensor) else copies[key] for key, tensor in tensors.items()}
        parts = {key: copies[key] for key, tensor in tensors.items() if isinstance(tensor, DTensor)}
        future = self._thread.submit(self._write, header, StagedPlanner(planned, parts), files)
        self._pending = step, future

    def wait(self) -> None:
        """Returns when the last save is committed. Raises: SaveError: it failed; names the step and the path."""
        if self._pending is None:
            return
        step, future = self._pending
        try:
            future.result()
            self._newest = step
            self._superseded = set()
        # torch's CheckpointException is none of Exception
        except (Exception, CheckpointException) as error:
            raise SaveError(f"{self._folder}: saving step {step} failed: {_reason(error)}") from error
        finally:
            self._pending = None

    def close(self) -> None:
        """Waits for the last save and lets go of the folder. Raises: SaveError, as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._lock is not None:
                self._lock.release()
            if self._own_group is not None and dist.is_initialized():
                # gone already if the ranks have left their world
                with suppress(ValueError, AssertionError):
                    dist.destroy_process_group(self._own_group)

    def _open(self) -> set[int]:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = WriteLock(self._folder, self._run)
        folders.clean(self._folder)
        return set(folders.complete(self._folder))

    def _write(self, header: _Header, planner: StagedPlanner, common: dict[str, bytes]) -> None:
        headers = self._gather(header)
        path = self._on_first(lambda: self._start(headers))
        try:
            writer = TensorWriter(path, self._rank)
            save_state({}, storage_writer=writer, planner=planner, process_group=self._group, no_dist=self._size == 1)
            written = self._gather(writer.files)
            self._on_first(lambda: self._commit(header.step, path, written, common))
        finally:
            if self._rank == 0:
                shutil.rmtree(path, ignore_errors=True)

    def _start(self, headers: list[_Header]) -> Path:
        _check(headers)
        return folders.start(self._folder, headers[0].step)

    def _commit(self, step: int, path: Path, written: list[dict[str, FileRecord]], common: dict[str, bytes]) -> None:
        files = {name: record for ranks in written for name, record in ranks.items()}
        for name, content in common.items():
            write_synced(path / name, content)
            files[name] = FileRecord(len(content), zlib.crc32(content))
        folders.commit(path, self._folder, Manifest(step, self._size, files))
        folders.retain(self._folder, self._keep, self._superseded - {step})

    def _gather(self, value: T) -> list[T]:
        """The values of all ranks on rank 0, which goes on when all have come; elsewhere nothing of use."""
        values: list[Any] = [value]
        if self._size > 1:
            values = [None] * self._size
            dist.gather_object(value, values if self._rank == 0 else None, group=self._group, group_dst=0)
        return values

    def _on_first(self, function: Callable[[], T]) -> T:
        """What rank 0 gets from `function`, on all ranks; an error there is an error everywhere."""
        outcome: list[Any] = [None, None]
        if self._rank == 0:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        if self._size > 1:
            dist.broadcast_object_list(outcome, group=self._group, group_src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _signatures(tensors: dict[str, Tensor]) -> dict[str, Signature]:
    return {name: signature(tensor) for name, tensor in tensors.items()}


def _share_of(dense: dict[str, Tensor], rank: int, size: int) -> list[str]:
    """Names of the dense tensors that this rank writes: its parts of DTensors, and about 1/size of the bytes of the others.

    Every rank comes to the same shares without a word, since all have the same tensors: the largest first, each to the rank
    that has least.
    """
    bytes_by_rank = [0] * size
    mine = []
    for name in sorted(dense, key=lambda name: (-dense[name].nbytes, name)):
        if isinstance(dense[name], DTensor):
            mine.append(name)
            continue
        to = min(range(size), key=bytes_by_rank.__getitem__)
        bytes_by_rank[to] += dense[name].nbytes
        if to == rank:
            mine.append(name)
    return mine


def _check(headers: list[_Header]) -> None:
    """Raises: ValueError: the ranks do not hold parts of one state."""
    first = headers[0]
    experts: dict[str, Signature] = {}
    for rank, header in enumerate(headers):
        if header.step != first.step:
            raise ValueError(f"rank {rank} saves step {header.step}, rank 0 step {first.step}")
        for what, mine, theirs in (("dense", first.dense, header.dense), ("common", first.common, header.common)):
            differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            if differing:
                raise ValueError(f"{what}() must be equal on all ranks; ranks 0 and {rank} differ in {differing[0]}")
        for key, found in header.experts.items():
            if experts.setdefault(key, found) != found:
                raise ValueError(f"rank {rank} has {key} as {found}, another rank as {experts[key]}")
    kinds: dict[str, set[str]] = {}
    numbers: dict[str, set[int]] = {}
    for key in experts:
        _, layer, expert, kind = key.split("/", 3)
        kinds.setdefault(layer, set()).add(kind)
        numbers.setdefault(layer, set()).add(int(expert))
    for layer, present in numbers.items():
        for expert in range(max(present) + 1):
            for kind in sorted(kinds[layer]):
                if f"experts/{layer}/{expert}/{kind}" not in experts:
                    raise ValueError(f"no rank keeps experts/{layer}/{expert}/{kind}; the state is not whole")


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {cause}"
    return str(error)

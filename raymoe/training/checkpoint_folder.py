"""The folder of a run's checkpoints: names, manifests, the commit, and which run may write.

folder/step-00000100/    a complete checkpoint
folder/.saving-*         one that is being written, or whose writer died
folder/.replaced-*       the one that a commit of the same step is about to replace
folder/.removed-*        one that retention is removing
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from raymoe.training.checkpoint_state import CheckpointError
from raymoe.training.checkpoint_storage import FileRecord, write_synced

MANIFEST = "manifest.json"
_FORMAT = 1
_LOCK = "writer.lock"
_COMPLETE = re.compile(r"(?:\.replaced-)?step-(\d+)")


@dataclass(frozen=True)
class Manifest:
    """Last file to be written: what belongs to the checkpoint."""

    step: int
    size: int
    """Number of ranks that saved."""
    files: dict[str, FileRecord]

    def write(self, path: Path) -> None:
        files = {name: [record.num_bytes, record.crc32] for name, record in sorted(self.files.items())}
        content = {"format": _FORMAT, "step": self.step, "size": self.size, "files": files}
        write_synced(path / MANIFEST, json.dumps(content | {"crc32": _crc32(content)}, indent=1).encode())

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises: CheckpointError: no checkpoint, a partial one, a damaged manifest, or one of a later format."""
        file = path / MANIFEST
        try:
            content = json.loads(file.read_bytes())
            checksum = content.pop("crc32")
            if checksum != _crc32(content):
                raise CheckpointError(f"{file}: damaged: its checksum does not match its content")
            if content["format"] != _FORMAT:
                raise CheckpointError(
                    f"{file}: format {content['format']}; this version of raymoe reads format {_FORMAT}"
                )
            files = {name: FileRecord(*record) for name, record in content["files"].items()}
            return cls(content["step"], content["size"], files)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no complete checkpoint: {MANIFEST} is missing") from None
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: damaged: {type(error).__name__}: {error}") from None

    def check_files(self, path: Path) -> None:
        """Raises: CheckpointError: a file is missing or has another size."""
        for name, record in self.files.items():
            file = path / name
            try:
                num_bytes = file.stat().st_size
            except FileNotFoundError:
                raise CheckpointError(f"{file}: missing") from None
            if num_bytes != record.num_bytes:
                how = "truncated" if num_bytes < record.num_bytes else "damaged"
                raise CheckpointError(f"{file}: {how}: {num_bytes} bytes, {record.num_bytes} were written")

    def read_file(self, path: Path, name: str) -> bytes:
        """Content of a file that has a checksum as a whole. Raises: CheckpointError, naming the file."""
        record = self.files.get(name)
        if record is None:
            raise CheckpointError(f"{path / MANIFEST}: damaged: it does not list {name}")
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}") from None
        if zlib.crc32(content) != record.crc32:
            raise CheckpointError(f"{path / name}: damaged: its checksum does not match its bytes")
        return content


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; partial ones are passed over. Contents are checked when it is loaded.

    Ask on one rank, for all, and load before a new `Checkpointer` may rename or remove it.
    """
    found = complete(folder)
    return found[max(found)] if found else None


def complete(folder: Path) -> dict[int, Path]:
    """Step -> complete checkpoint, by manifest and sizes of files."""
    found: dict[int, Path] = {}
    # `step-` sorts after `.replaced-step-` and wins
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _COMPLETE.fullmatch(path.name)
        if match is None:
            continue
        try:
            manifest = Manifest.read(path)
            manifest.check_files(path)
        except CheckpointError:
            continue
        if manifest.step == int(match[1]):
            found[manifest.step] = path
    return found


def _locked(path: Path) -> tuple[TextIO, str | None]:
    """The file, open and locked by us, or who has it."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held for as long as the lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            return file, file.read().strip() or "unknown"
    return file, None


class WriteLock:
    """Keeps other runs from writing into a folder; the system frees it when the process dies.

    Args:
        run: whose process of an earlier epoch may still have the lock, stopped or cut off: what it had begun is cleaned away, and
            the lock is made anew beside it.

    Raises:
        ValueError: another run writes there.
    """

    def __init__(self, folder: Path, run: str | None):
        path = folder / _LOCK
        file, holder = _locked(path)
        if holder is not None and run is not None and holder.endswith(f", run {run}"):
            path.unlink()
            file, holder = _locked(path)
        if holder is not None:
            raise ValueError(
                f"{folder}: another run is writing checkpoints here ({holder}); give this run a folder of its own"
            )
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, process {os.getpid()}{'' if run is None else f', run {run}'}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        self._file.close()


def start(folder: Path, step: int) -> Path:
    """A fresh directory for a save; what crashed saves left is removed before."""
    clean(folder)
    # a rank of a dead run may still write: it must not meet a directory of its own name
    path = folder / f".saving-{_name(step)}-{secrets.token_hex(4)}"
    path.mkdir()
    return path


def commit(path: Path, folder: Path, manifest: Manifest) -> None:
    """Makes the directory `path` the checkpoint of its step. Crash where it may: a complete one is found."""
    manifest.write(path)
    sync_directory(path)
    target = folder / _name(manifest.step)
    if target.exists():
        target.rename(folder / f".replaced-{target.name}")
    path.rename(target)
    sync_directory(folder)


def retain(folder: Path, keep: int, superseded: set[int]) -> None:
    """Removes `superseded` steps, and all but the `keep` newest of the others."""
    found = complete(folder)
    kept = sorted(found.keys() - superseded)[-keep:]
    for step in found.keys() - set(kept):
        found[step].rename(folder / f".removed-{found[step].name}-{secrets.token_hex(4)}")
    clean(folder)


def clean(folder: Path) -> None:
    """Removes what crashed saves and removals left; takes back a checkpoint whose replacement was never committed."""
    for path in folder.iterdir():
        if path.name.startswith(".replaced-"):
            target = folder / path.name.removeprefix(".replaced-")
            if target.exists():
                shutil.rmtree(path)
            else:
                path.rename(target)
        elif path.name.startswith((".saving-", ".removed-")):
            shutil.rmtree(path)


def sync_directory(path: Path) -> None:
    """Makes renames and new names in the directory last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _crc32(content: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())

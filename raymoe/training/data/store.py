"""Tokens on disk, in shards that one process writes and every rank maps into memory, while they are still being written.

A store is a folder: ``N.tokens`` (uint16 or uint32, little endian) and, where not all tokens are learnt, ``N.counts`` (uint8)
for every shard of a fixed number of tokens, and ``index.json``, which is replaced as a whole and never says more than is there.
"""

import json
import os
import time
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from raymoe.telemetry.files import write_text

SHARD_TOKENS = 1 << 24
INDEX = "index.json"

_LAYOUT = 1
_PUBLISH_S = 0.5
_POLL_S = 0.1
_OPEN_SHARDS = 64
_CHECK_BYTES = 1 << 22


class StoreError(ValueError):
    """A store that cannot be read: damaged, of another layout, or given up by the one that wrote it."""


@dataclass(frozen=True, slots=True)
class Index:
    """What ``index.json`` says."""

    digest: str | None
    """Of what the tokens were made from; None if that cannot be told."""
    dtype: str
    has_counts: bool
    shuffle: int | None
    """Sequences in a window of the shuffle; None: all."""
    shard_tokens: int = SHARD_TOKENS
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes that the learnt tokens stand for."""
    examples: int = 0
    checksums: tuple[tuple[int, ...], ...] = ()
    """CRC-32 of every shard's files so far."""
    is_complete: bool = False
    error: str | None = None
    """Why there will be no more."""


class StoreWriter:
    """Appends tokens; readers see them at the latest half a second and one `append` later."""

    def __init__(self, folder: Path, index: Index) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        clear_store(folder)
        self._folder, self._index = folder, index
        self._files: list[BinaryIO] = []
        self._checksums: list[list[int]] = []
        self._published_s = 0.0
        self._publish()

    def append(self, tokens: np.ndarray, counts: np.ndarray | None, num_bytes: int, num_examples: int) -> None:
        """Adds tokens int [N], and with `has_counts` bool [N]. Raises: OSError if the disk refuses."""
        assert (counts is not None) == self._index.has_counts
        done = 0
        while done < len(tokens):
            used = self._index.tokens % self._index.shard_tokens
            if used == 0:
                self._next_shard()
            end = min(len(tokens), done + self._index.shard_tokens - used)
            self._write(0, tokens[done:end].astype(self._index.dtype))
            if counts is not None:
                self._write(1, counts[done:end].astype(np.uint8))
            self._index = replace(self._index, tokens=self._index.tokens + end - done)
            done = end
        self._index = replace(
            self._index, bytes=self._index.bytes + num_bytes, examples=self._index.examples + num_examples
        )
        if time.monotonic() - self._published_s > _PUBLISH_S:
            self._publish()

    def finish(self) -> None:
        """Says that this is all."""
        self._index = replace(self._index, is_complete=True)
        self._publish()
        self._close()

    def fail(self, error: str) -> None:
        """Says why there will be no more, so that readers do not wait for it."""
        self._index = replace(self._index, error=error)
        try:
            self._publish()
        finally:
            self._close()

    def _write(self, file: int, values: np.ndarray) -> None:
        data = values.tobytes()
        self._files[file].write(data)
        self._checksums[-1][file] = zlib.crc32(data, self._checksums[-1][file])

    def _next_shard(self) -> None:
        self._close()
        paths = shard_paths(self._folder, len(self._checksums), self._index.has_counts)
        self._files = [path.open("wb") for path in paths]
        self._checksums.append([0] * len(paths))

    def _close(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._files = []

    def _publish(self) -> None:
        for file in self._files:
            file.flush()
            # other machines read through a network file system, which orders nothing by itself
            os.fsync(file.fileno())
        self._index = replace(self._index, checksums=tuple(tuple(shard) for shard in self._checksums))
        write_index(self._folder, self._index)
        self._published_s = time.monotonic()


class TokenStore:
    """The reading side: what is there so far, and how to wait for more.

    Args:
        timeout_s: how long to wait for progress of whoever writes.

    Raises:
        StoreError: no store, or one of another layout.
    """

    def __init__(self, folder: Path, *, timeout_s: float = 300) -> None:
        self.folder, self._timeout_s = folder, timeout_s
        self.index = read_index(folder)
        self._open: OrderedDict[int, list[np.ndarray]] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        """Tokens that can be read."""
        return self.index.tokens

    @property
    def is_complete(self) -> bool:
        """Whether there will be no more."""
        return self.index.is_complete

    def wait(self, num_tokens: int | None) -> None:
        """Until so many tokens are there (None: all), or it is known that they will not be.

        Raises:
            StoreError: the tokenising failed; says why.
            TimeoutError: nothing has come for `timeout_s`.
        """
        last_progress = time.monotonic()
        while not self.is_complete and (num_tokens is None or self.num_tokens < num_tokens):
            before = self.num_tokens
            self.index = read_index(self.folder)
            if self.index.error is not None:
                raise StoreError(f"the text could not be tokenised: {self.index.error}")
            now = time.monotonic()
            if self.num_tokens > before or self.is_complete:
                last_progress = now
            elif now - last_progress > self._timeout_s:
                wanted = "all tokens" if num_tokens is None else f"{num_tokens} tokens"
                raise TimeoutError(
                    f"{self.folder}: waited {self._timeout_s:.0f} s for {wanted}; still {self.num_tokens}. "
                    "Is the process that tokenises alive?"
                )
            else:
                time.sleep(_POLL_S)

    def read(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Runs of tokens, wherever shards end.

        Args:
            starts: int64 [R].

        Returns:
            int64 [R, length]; and whether each is learnt, bool [R, length], or None if all are.

        Raises:
            StoreError: a shard is shorter than the index says.
        """
        tokens = np.empty((len(starts), length), dtype=np.int64)
        counts = np.empty((len(starts), length), dtype=bool) if self.index.has_counts else None
        for row, start in enumerate(starts.tolist()):
            done = 0
            while done < length:
                shard, offset = divmod(start + done, self.index.shard_tokens)
                end = min(length, done + self.index.shard_tokens - offset)
                arrays = self._shard(shard, offset + end - done)
                tokens[row, done:end] = arrays[0][offset : offset + end - done]
                if counts is not None:
                    counts[row, done:end] = arrays[1][offset : offset + end - done]
                done = end
        return tokens, counts

    def frequencies(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs in what is there, int64 [V]. Raises: ValueError for a token outside of [0, V)."""
        total = np.zeros(vocab_size, dtype=np.int64)
        for shard in range(-(-self.num_tokens // self.index.shard_tokens)):
            size = min(self.index.shard_tokens, self.num_tokens - shard * self.index.shard_tokens)
            counts = np.bincount(self._shard(shard, size)[0][:size], minlength=vocab_size)
            if len(counts) > vocab_size:
                raise ValueError(f"token {len(counts) - 1} in {self.folder}, but vocab_size is {vocab_size}")
            total += counts
        return total

    def verify(self) -> None:
        """Reads every file once. Raises: StoreError naming the file that is missing, cut or changed."""
        for shard, checksums in enumerate(self.index.checksums):
            paths = shard_paths(self.folder, shard, self.index.has_counts)
            for path, expected in zip(paths, checksums, strict=True):
                if not path.is_file() or _checksum(path) != expected:
                    state = "is damaged" if path.is_file() else "is missing"
                    raise StoreError(f"{path} {state}; remove {self.folder} to have the text tokenised anew")

    def _shard(self, shard: int, needed: int) -> list[np.ndarray]:
        arrays = self._open.pop(shard, None)
        if arrays is None or len(arrays[0]) < needed:
            arrays = self._map(shard, needed)
            while len(self._open) >= _OPEN_SHARDS:  # each keeps a file descriptor
                self._open.popitem(last=False)
        self._open[shard] = arrays
        return arrays

    def _map(self, shard: int, needed: int) -> list[np.ndarray]:
        size = min(self.index.shard_tokens, self.num_tokens - shard * self.index.shard_tokens)
        assert needed <= size, "wait() comes first"
        arrays = []
        paths = shard_paths(self.folder, shard, self.index.has_counts)
        for path, dtype in zip(paths, (self.index.dtype, "u1"), strict=False):
            try:
                arrays.append(np.memmap(path, dtype, "r", shape=(size,)))
            except (OSError, ValueError) as error:
                raise StoreError(
                    f"{path} is missing or shorter than {size} tokens; remove {self.folder} to have the text tokenised anew"
                ) from error
        return arrays


def shard_paths(folder: Path, shard: int, has_counts: bool) -> list[Path]:
    """The files of a shard."""
    return [folder / f"{shard:05d}.{kind}" for kind in (("tokens", "counts") if has_counts else ("tokens",))]


def clear_store(folder: Path) -> None:
    """Removes a store's files from a folder, and nothing else."""
    # the index first: without it the rest is not a store
    for pattern in (INDEX, "*.tokens", "*.counts"):
        for path in folder.glob(pattern):
            path.unlink()


def write_index(folder: Path, index: Index) -> None:
    """Replaces the index as a whole."""
    write_text(folder / INDEX, json.dumps({"layout": _LAYOUT} | asdict(index)) + "\n")


def read_index(folder: Path) -> Index:
    """Raises: StoreError if there is none that can be read."""
    path = folder / INDEX
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("layout") != _LAYOUT:
            raise StoreError(
                f"{path}: written by another version of raymoe; remove {folder} to have the text tokenised anew"
            )
        fields["checksums"] = tuple(tuple(shard) for shard in fields["checksums"])
        return Index(**fields)
    except OSError as error:
        raise StoreError(f"{folder} holds no tokens: {error}") from error
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged; remove {folder} to have the text tokenised anew") from error


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(_CHECK_BYTES):
            checksum = zlib.crc32(data, checksum)
    return checksum

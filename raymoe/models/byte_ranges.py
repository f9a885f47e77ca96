"""Ranges of bytes out of files, past the page cache where the file system lets us: what experts are read with.

A page cache that serves reads makes a tier look faster than it is and takes memory outside of any budget, so the default for
serving is direct I/O: whole blocks from the device into memory of ours.
"""

import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raymoe.models.landing import Landing, TensorReadError
from raymoe.models.open_file import BLOCK, OpenFile, round_up

_log = logging.getLogger(__name__)

_STAGING_BYTES = 16 * 2**20
_MERGED_GAP = 64 * 1024
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


@dataclass
class ReadCounters:
    """What has been read so far."""

    ranges: int = 0
    """Requests to the operating system."""
    needed_bytes: int = 0
    device_bytes: int = 0
    """Asked of the device, in whole blocks; 0 where the page cache may serve, for then nobody can tell."""
    seconds: float = 0.0
    """Spent reading, summed over the threads that read."""


class _Stretch(NamedTuple):
    """A part of a file that one request fills."""

    start: int
    stop: int
    memory: memoryview | None
    """Where the bytes go at once; None: to the staging buffer."""


class _Staging(threading.local):
    """A page-aligned buffer a thread."""

    def __init__(self) -> None:
        buffer = mmap.mmap(-1, _STAGING_BYTES)
        self.memory = memoryview(buffer)
        self.tensor = torch.frombuffer(buffer, dtype=torch.uint8)


class RangeReader:
    """Reads ranges of some files, each opened once. Safe to use from several threads.

    `mode` says how: `direct` (O_DIRECT), `dropped` (where that is refused: buffered, and what was read is dropped from the page
    cache at once), or `cached` (the page cache serves, as asked for).
    """

    def __init__(self, *, direct_io: bool):
        self.mode = "direct" if direct_io else "cached"
        self._lock = threading.Lock()
        self._counters = ReadCounters()
        self._files: dict[Path, OpenFile] = {}
        self._staging = _Staging()

    @property
    def counters(self) -> ReadCounters:
        with self._lock:
            return replace(self._counters)

    def facts(self) -> dict[str, Any]:
        """How files are read, and what the device was asked for, as plain values."""
        counters = self.counters
        return {
            "mode": self.mode,
            "requests": counters.ranges,
            "needed_bytes": counters.needed_bytes,
            "device_bytes": counters.device_bytes,
        }

    def open(self, path: Path) -> None:
        """Opens a file, so that later reads are of what stands there now.

        Raises:
            OSError: it cannot be opened.
        """
        with self._lock:
            if path not in self._files:
                self._files[path] = self._opened(path)

    def read(self, landings: Sequence[Landing]) -> int:
        """Fills every landing; neighbours in a file come with one request. After an error the landings hold anything.

        Returns:
            Bytes of the landings together, as they are in the files.

        Raises:
            TensorReadError: the device fails, the file ends too early or has changed, or a checksum differs.
        """
        begin_s = time.perf_counter()
        counted = ReadCounters()
        for path, group in groupby(sorted(landings, key=attrgetter("file", "start")), key=attrgetter("file")):
            present = [landing for landing in group if landing.flat.numel()]
            for run in _runs(present):
                self._read_run(path, run, counted)
            counted.needed_bytes += sum(landing.stop - landing.start for landing in present)
        counted.seconds = time.perf_counter() - begin_s
        with self._lock:
            for name, value in vars(counted).items():
                setattr(self._counters, name, getattr(self._counters, name) + value)
        return counted.needed_bytes

    def probe(self, path: Path, start: int, num_bytes: int) -> None:
        """Reads a range and lets it go, at most 16 MiB of it: to measure what the device does."""
        begin = start - start % BLOCK
        stretch = _Stretch(begin, begin + min(round_up(start + num_bytes - begin), _STAGING_BYTES), None)
        self._fill(path, [stretch], start + 1, str(path), ReadCounters())

    def _read_run(self, path: Path, run: list[Landing], counted: ReadCounters) -> None:
        staged = set()
        for chunk in _chunks(_stretches(run, self._block)):
            needed_to = min(run[-1].stop, chunk[-1].stop)
            name = next(landing.name for landing in run if landing.stop > chunk[0].start)
            places = self._fill(path, chunk, needed_to, name, counted)
            for stretch, place in zip(chunk, places, strict=True):
                if stretch.memory is not None:
                    continue
                for landing in run:
                    low, high = max(landing.start, stretch.start), min(landing.stop, stretch.stop)
                    if low < high:
                        begin = place + low - stretch.start
                        landing.put(low, self._staging.tensor[begin : begin + high - low])
                        staged.add(landing)
        for landing in run:
            landing.check(was_put=landing in staged)

    @property
    def _block(self) -> int:
        return BLOCK if self.mode == "direct" else 1

    def _fill(self, path: Path, chunk: list[_Stretch], needed_to: int, name: str, counted: ReadCounters) -> list[int]:
        """One request for stretches that follow each other; where in the staging buffer each of them begins."""
        places, buffers, used = [], [], 0
        for stretch in chunk:
            place = used + stretch.start % BLOCK
            places.append(place)
            size = stretch.stop - stretch.start
            if stretch.memory is None:
                buffers.append(self._staging.memory[place : place + size])
                used = round_up(place + size)
            else:
                buffers.append(stretch.memory)
        file = self._file(path)
        try:
            file.check()
            got = self._request(file, buffers, chunk[0].start, needed_to - chunk[0].start, counted)
        except OSError as error:
            raise TensorReadError(f"{path}: tensor '{name}' cannot be read: {error.strerror or error}") from error
        if got < needed_to - chunk[0].start:
            raise TensorReadError(
                f"{path}: tensor '{name}' cannot be read: the file ends at byte {chunk[0].start + got}, needed are "
                f"{needed_to}; it was cut short, fetch it again"
            )
        return places

    def _request(
        self, file: OpenFile, buffers: list[memoryview], start: int, needed: int, counted: ReadCounters
    ) -> int:
        """Bytes read, at least `needed` unless the file ends before."""
        asked = sum(len(buffer) for buffer in buffers)
        got = 0
        while got < needed:
            try:
                read = os.preadv(file.number, _after(buffers, got), start + got)
            except OSError as error:
                # some file systems take the flag and refuse the read
                if file.is_direct and error.errno in _REFUSALS:
                    self._refuse(file)
                    continue
                raise
            counted.ranges += 1
            got += read
            if read == 0 or (file.is_direct and got % BLOCK):
                break
        if self.mode == "dropped":
            file.drop(start, asked)
        if self.mode != "cached":
            counted.device_bytes += round_up(start % BLOCK + asked)
        return got

    def _file(self, path: Path) -> OpenFile:
        if path not in self._files:
            self.open(path)
        return self._files[path]

    def _opened(self, path: Path) -> OpenFile:
        if self.mode == "direct":
            try:
                return OpenFile(path, is_direct=True)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._fall_back(path)
        return OpenFile(path, is_direct=False)

    def _refuse(self, file: OpenFile) -> None:
        with self._lock:
            if self.mode == "direct":
                self._fall_back(file.path)
            file.make_buffered()

    def _fall_back(self, path: Path) -> None:
        self.mode = "dropped"
        _log.warning(
            "%s: its file system refuses direct I/O; experts are read through the page cache and dropped from it", path
        )


def _runs(landings: list[Landing]) -> Iterator[list[Landing]]:
    """Landings that one request may serve: what lies between them costs less than another request."""
    run: list[Landing] = []
    for landing in landings:
        if run and landing.start - run[-1].stop > _MERGED_GAP:
            yield run
            run = []
        run.append(landing)
    if run:
        yield run


def _stretches(run: list[Landing], block: int) -> Iterator[_Stretch]:
    """The run from its first block to its last, cut where bytes can go straight to where they are wanted."""
    position = run[0].start - run[0].start % block
    for landing in run:
        memory = landing.memory
        if memory is None or landing.start % block or landing.stop % block or landing.flat.data_ptr() % block:
            continue
        if position < landing.start:
            yield _Stretch(position, landing.start, None)
        yield _Stretch(landing.start, landing.stop, memory)
        position = landing.stop
    end = round_up(run[-1].stop, block)
    if position < end:
        yield _Stretch(position, end, None)


def _chunks(stretches: Iterator[_Stretch]) -> Iterator[list[_Stretch]]:
    """Groups of stretches that need no more than the staging buffer; long ones are cut at whole blocks of the file."""
    chunk: list[_Stretch] = []
    room = _STAGING_BYTES
    for stretch in stretches:
        while stretch.memory is None and stretch.stop - stretch.start + stretch.start % BLOCK > room:
            cut = stretch.start - stretch.start % BLOCK + room
            if cut > stretch.start:
                chunk.append(_Stretch(stretch.start, cut, None))
                stretch = stretch._replace(start=cut)
            yield chunk
            chunk, room = [], _STAGING_BYTES
        chunk.append(stretch)
        if stretch.memory is None:
            room -= round_up(stretch.stop - stretch.start + stretch.start % BLOCK)
    if chunk:
        yield chunk


def _after(buffers: list[memoryview], skipped: int) -> list[memoryview]:
    """What is left of the buffers when `skipped` bytes of them are full."""
    rest = []
    for buffer in buffers:
        if skipped < len(buffer):
            rest.append(buffer[skipped:])
        skipped = max(0, skipped - len(buffer))
    return rest

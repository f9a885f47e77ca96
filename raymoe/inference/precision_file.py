"""A checkpoint's experts in fewer bits, in one file beside it, so that fewer bytes are read when an expert is wanted.

The file: the length of a header, the header (JSON), its CRC-32, then the experts, layer by layer, each from a whole block on.
"""

import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from raymoe.config.precision import Precision
from raymoe.inference.expert_precision import ExpertCodec
from raymoe.models import ExpertFiles, MoELayer
from raymoe.models.byte_ranges import RangeReader
from raymoe.models.landing import Landing
from raymoe.models.open_file import round_up

_VERSION = 1
_LOSS_BYTES = 64 * 1024
"""Room for what is measured only when the experts are written."""


def precision_path(model: Path | str, precision: Precision) -> Path:
    """Where a model's experts in that precision are kept."""
    return Path(model) / f"experts.{str(precision).replace(':', '-')}.raymoe"


def codecs_of(layers: Sequence[MoELayer], precision: Precision) -> list[ExpertCodec]:
    """As the file holds experts, of each layer: what is not in fewer bits is float32, whatever the computation's dtype."""
    return [ExpertCodec(layer.layout, layer.spec, precision, torch.float32) for layer in layers]


class PrecisionWriter:
    """Makes the file; until `finish` it lies under another name, and leaving the `with` before that removes it."""

    def __init__(self, model: Path | str, files: ExpertFiles, precision: Precision):
        """
        Raises:
            ValueError: the precision is native, which is the checkpoint itself.
        """
        if not precision.is_lossy:
            raise ValueError("precision: native is what the checkpoint holds itself; use bf16, int8 or int4")
        self.path = precision_path(model, precision)
        self.partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        self._files, self._precision = files, precision
        self._codecs = codecs_of(files.layers, precision)
        self._crc32 = [[0] * layer.num_experts for layer in files.layers]
        self._fingerprint = files.fingerprint()
        self._data_start = round_up(len(self._header({})) + _LOSS_BYTES)

    def __enter__(self) -> "PrecisionWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.partial.unlink(missing_ok=True)

    def write(self, advance: Callable[[], object] = lambda: None) -> None:
        """Writes all experts, one at a time; `advance` is called after each.

        Raises:
            TensorReadError: the checkpoint's cannot be read.
            OSError: there is no room for them.
        """
        with self.partial.open("wb") as file:
            position = self._data_start
            for layer, codec in zip(self._files.layers, self._codecs, strict=True):
                flat, stored = torch.zeros(layer.layout.numel), torch.zeros(codec.num_bytes, dtype=torch.uint8)
                for expert in range(layer.num_experts):
                    self._files.read(layer.index, expert, flat)
                    codec.encode(flat, stored)
                    data = stored.numpy().data
                    self._crc32[layer.index][expert] = zlib.crc32(data)
                    file.seek(position)
                    file.write(data)
                    position += round_up(codec.num_bytes)
                    advance()
            # direct I/O reads whole blocks, the last one too
            file.truncate(position)
            self._write_header(file, {})

    def finish(self, loss: dict[str, Any]) -> Path:
        """Adds what the precision costs, plain values, and gives the file its name."""
        with self.partial.open("r+b") as file:
            self._write_header(file, loss)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)
        return self.path

    def _write_header(self, file: BinaryIO, loss: dict[str, Any]) -> None:
        header = self._header(loss)
        if len(header) > self._data_start:
            raise ValueError(f"{self.path}: what was measured takes more than the {_LOSS_BYTES} bytes there are for it")
        file.seek(0)
        file.write(header)

    def _header(self, loss: dict[str, Any]) -> bytes:
        held = {
            "version": _VERSION,
            "precision": str(self._precision),
            "fingerprint": self._fingerprint,
            "expert_bytes": [codec.num_bytes for codec in self._codecs],
            "data_start": getattr(self, "_data_start", 0),
            "crc32": [[f"{value:08x}" for value in layer] for layer in self._crc32],
            "loss": loss,
        }
        text = json.dumps(held).encode()
        return struct.pack("<Q", len(text)) + text + struct.pack("<I", zlib.crc32(text))


class PrecisionTier:
    """An `ExpertSource`: the file of a checkpoint's experts in fewer bits. Safe to use from several threads.

    Into slots of bytes experts come as they are stored, into others decoded. Checksums are compared the first time that an
    expert is read.
    """

    def __init__(self, path: Path, files: ExpertFiles, precision: Precision, *, direct_io: bool = False):
        """Opens `path`, a file that `PrecisionWriter` made from `files`.

        Raises:
            ValueError: there is no such file, or it is damaged, of another version or precision, or of another checkpoint.
        """
        self.path = path
        make = f"make it with 'raymoe experts {path.parent} --precision {precision}'"
        if not path.is_file():
            raise ValueError(f"expert_precision: {precision}: there is no {path.name} in {path.parent}; {make}")
        self._codecs = codecs_of(files.layers, precision)
        held = _read_header(path, make)
        wanted_bytes = [codec.num_bytes for codec in self._codecs]
        if (held["precision"], held["expert_bytes"]) != (str(precision), wanted_bytes):
            raise ValueError(f"{path}: holds experts of other sizes, or in {held['precision']}; {make}")
        if held["fingerprint"] != files.fingerprint():
            raise ValueError(f"{path}: was made from other experts than those of this checkpoint; {make}")
        self.loss: dict[str, Any] = held["loss"]
        """What the precision costs, as measured when the file was made."""
        self._crc32 = {
            (layer, expert): int(text, 16)
            for layer, sums in enumerate(held["crc32"])
            for expert, text in enumerate(sums)
        }
        self._start: dict[tuple[int, int], int] = {}
        position = held["data_start"]
        for layer, codec in zip(files.layers, self._codecs, strict=True):
            for expert in range(layer.num_experts):
                self._start[layer.index, expert] = position
                position += round_up(codec.num_bytes)
        if path.stat().st_size != position:
            raise ValueError(f"{path}: has {path.stat().st_size} bytes, not {position}: it was cut short; {make}")
        self._reader = RangeReader(direct_io=direct_io)
        self._reader.open(path)
        self._buffer = threading.local()

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """See `ExpertSource.read`."""
        codec = self._codecs[layer]
        stored = out if out.dtype == torch.uint8 else self._stored(codec.num_bytes)
        name = f"expert {expert} of MoE layer {layer}"
        crc32 = self._crc32.get((layer, expert))
        self._reader.read([Landing(self.path, self._start[layer, expert], torch.uint8, stored, name, crc32)])
        self._crc32.pop((layer, expert), None)
        if stored is not out:
            codec.decode(stored, out)
        return codec.num_bytes

    def probe(self, layer: int, expert: int, num_bytes: int) -> None:
        """See `CheckpointTier.probe`."""
        self._reader.probe(self.path, self._start[layer, expert], min(num_bytes, self._codecs[layer].num_bytes))

    def facts(self) -> dict[str, Any]:
        """See `CheckpointTier.facts`."""
        return self._reader.facts()

    def _stored(self, num_bytes: int) -> Tensor:
        """Memory of the calling thread's."""
        found: Tensor | None = getattr(self._buffer, "stored", None)
        if found is None:
            largest = max(codec.num_bytes for codec in self._codecs)
            found = self._buffer.stored = torch.empty(largest, dtype=torch.uint8)
        return found[:num_bytes]


class EncodedTier:
    """An `ExpertSource`: the checkpoint's own files, each expert brought to what the precision's file holds, bit for bit.

    For when that file fails: slower, but nobody's tokens change.
    """

    def __init__(self, files: ExpertFiles, precision: Precision):
        self._files, self._codecs = files, codecs_of(files.layers, precision)

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """See `ExpertSource.read`."""
        codec = self._codecs[layer]
        flat = torch.zeros(codec.layout.numel)
        moved_bytes = self._files.read(layer, expert, flat)
        if out.dtype == torch.uint8:
            codec.encode(flat, out)
            return moved_bytes
        stored = torch.empty(codec.num_bytes, dtype=torch.uint8)
        codec.encode(flat, stored)
        codec.decode(stored, out)
        return moved_bytes

    def facts(self) -> dict[str, Any]:
        """See `CheckpointTier.facts`."""
        return self._files.reader.facts()


def _read_header(path: Path, make: str) -> dict[str, Any]:
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            text = file.read(length)
            (crc32,) = struct.unpack("<I", file.read(4))
            if zlib.crc32(text) != crc32:
                raise ValueError("its header's checksum differs")
            held = json.loads(text)
            if held["version"] != _VERSION:
                raise ValueError(f"it is of version {held['version']}")
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not experts that this version of raymoe reads ({error}); {make}") from None
    return held

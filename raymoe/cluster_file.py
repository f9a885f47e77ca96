"""Cluster files: machines as a person writes them down, in YAML with units, and the presets that come with raymoe.

nodes: 4
devices_per_node: 8
device: A100-40G
flops: 140 TFLOP/s
memory: 40 GB
intra_bandwidth: 235 GB/s
inter_bandwidth: 400 Gb/s
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

import raymoe.placement
from raymoe.config import ConfigError, Strict, load_config
from raymoe.placement import ClusterSpec
from raymoe.telemetry.files import write_text

_PRESETS = Path(raymoe.placement.__file__).parent / "clusters"
_POWERS = {prefix: 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T", "P"))} | {"k": 1000}


def _units(names: Iterable[str], scale: Fraction = Fraction(1)) -> dict[str, Fraction]:
    return {power + name: value * scale for name in names for power, value in _POWERS.items()}


def _byte_units(suffix: str) -> dict[str, Fraction]:
    binary = {f"{prefix}iB{suffix}": Fraction(1024**power) for power, prefix in enumerate("KMGT", start=1)}
    return _units([f"B{suffix}"]) | binary


_BYTES = _byte_units("")
_BANDWIDTH = _byte_units("/s") | _units(["b/s", "bit/s", "bps"], Fraction(1, 8))
_FLOPS = _units(["FLOP/s", "FLOPS", "FLOPs", "flop/s"])
_TIME_NS = {"ns": Fraction(1), "us": Fraction(1000), "ms": Fraction(10**6), "s": Fraction(10**9)}
_SHARE = {"%": Fraction(1)}


def _parser(units: Mapping[str, Fraction], least: int, wanted: str, *, plain: bool = True) -> BeforeValidator:
    """Whole base units of a text such as "12.5 GB/s"; of a plain number too, unless it would leave its unit open."""

    def parse(value: Any) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z/%]*)", str(value).strip())
        unit = units.get(match[2]) if match and match[2] else (Fraction(1) if plain else None)
        if match is None or unit is None or isinstance(value, bool) or Fraction(match[1]) * unit < least:
            raise ValueError(f"{str(value)!r} will not do; write {wanted}")
        return round(Fraction(match[1]) * unit)

    return BeforeValidator(parse)


def _writer(*units: tuple[str, int]) -> PlainSerializer:
    """The same as text, exactly, in the largest unit that needs no more than four decimals."""

    def write(value: int | None) -> str | None:
        if value is None:
            return None
        for name, size in units:
            if value >= size and value * 10_000 % size == 0:
                whole, rest = divmod(value * 10_000 // size, 10_000)
                return f"{whole}.{rest:04}".rstrip("0").rstrip(".") + f" {name}"
        return f"{value} {units[-1][0]}"

    return PlainSerializer(write)


def _decimal(unit: str, *prefixes: str) -> PlainSerializer:
    return _writer(*((prefix + unit, _POWERS[prefix]) for prefix in prefixes))


Bytes = Annotated[int, _parser(_BYTES, 1, "bytes with a unit, such as '80 GB' or '80GiB'")]
Bandwidth = Annotated[
    int, _parser(_BANDWIDTH, 1, "bytes or bits per second, such as '12.5 GB/s' or '100 Gb/s' (B: bytes, b: bits)")
]
Flops = Annotated[int, _parser(_FLOPS, 1, "floating-point operations per second, such as '50 TFLOP/s'")]
Time = Annotated[int, _parser(_TIME_NS, 0, "a time with its unit, such as '50us' or '0.2 ms'", plain=False)]
Percent = Annotated[int, Field(le=100), _parser(_SHARE, 0, "a share in percent, such as '100%'")]

_bytes_text = _decimal("B", "T", "G", "M", "K", "")
_bandwidth_text = _decimal("B/s", "T", "G", "M", "K", "")
_flops_text = _decimal("FLOP/s", "P", "T", "G", "M", "")
_time_text = _writer(("ms", 10**6), ("us", 1000), ("ns", 1))
_percent_text = PlainSerializer(lambda value: f"{value}%")


class ClusterConfig(Strict):
    """One kind of device in equal nodes. Read as numbers in bytes, FLOP/s, ns; dumped as the texts that a file holds."""

    nodes: int = Field(default=1, ge=1)
    """Machines, or whatever shares a fast link among its devices."""
    devices_per_node: int = Field(ge=1)
    device: str = "device"
    """What a device is called; for the reader."""
    flops: Annotated[Flops, _flops_text]
    """FLOP per second that a device reaches on expert GEMMs: measured, or the data sheet's times a share."""
    memory: Annotated[Bytes | None, _bytes_text] = None
    """Of a device. Without it nothing is bounded by memory."""
    intra_bandwidth: Annotated[Bandwidth | None, _bandwidth_text] = None
    """From one device to the others of its node, each way. Needed where a node has several."""
    inter_bandwidth: Annotated[Bandwidth | None, _bandwidth_text] = None
    """Between nodes, each way: of a node if `nic` is shared, else of a device. Needed where there are several nodes."""
    latency: Annotated[Time, _time_text] = 50_000
    """Fixed cost of one collective within a node."""
    inter_latency: Annotated[Time | None, _time_text] = None
    """The same between nodes; default: as within one."""
    nic: Literal["shared", "per_device"] = "shared"
    """Whether a node's devices share `inter_bandwidth` or have it each."""
    duplex: Literal["full", "half"] = "full"
    """Whether a link moves its bandwidth both ways at once."""
    tile_rows: int = Field(default=1, ge=1)
    """Rows that the grouped GEMM rounds each expert's rows up to."""
    overlap: Annotated[Percent, _percent_text] = 100
    """How much of the time that devices compute also moves bytes."""
    memory_bandwidth: Annotated[Bandwidth | None, _bandwidth_text] = None
    """Of a device's own memory: what decoding is bounded by."""
    host_memory: Annotated[Bytes | None, _bytes_text] = None
    """Memory of a node's host, for experts that no device holds."""
    host_bandwidth: Annotated[Bandwidth | None, _bandwidth_text] = None
    """From host memory to one device."""
    file_bandwidth: Annotated[Bandwidth | None, _bandwidth_text] = None
    """From a node's files to its host memory."""

    @model_validator(mode="after")
    def _links(self) -> ClusterConfig:
        if self.devices_per_node > 1 and self.intra_bandwidth is None:
            raise ValueError(
                f"intra_bandwidth: missing; {self.devices_per_node} devices in a node need it, such as '450 GB/s'"
            )
        if self.nodes > 1 and self.inter_bandwidth is None:
            raise ValueError(f"inter_bandwidth: missing; {self.nodes} nodes need it, such as '400 Gb/s'")
        return self

    @property
    def spec(self) -> ClusterSpec:
        """The same for planning."""
        # one device alone has no link, which then moves nothing
        intra_bytes_s = self.intra_bandwidth or self.inter_bandwidth or 1
        return ClusterSpec.even(
            self.nodes,
            self.devices_per_node,
            intra_bytes_s=intra_bytes_s,
            inter_bytes_s=self.inter_bandwidth or intra_bytes_s,
            latency_ns=self.latency,
            inter_latency_ns=self.inter_latency or 0,
            flops_s=self.flops,
            memory_bytes=self.memory,
            nic_shared=self.nic == "shared",
            full_duplex=self.duplex == "full",
            tile_rows=self.tile_rows,
            overlap_percent=self.overlap,
        )

    def describe(self) -> str:
        """One line: how many of what, and the links between them."""
        said = self.model_dump()
        parts = [f"{self.nodes} x {self.devices_per_node} {self.device} ({said['flops']}"]
        parts[0] += f", {said['memory']})" if self.memory else ")"
        if self.devices_per_node > 1:
            parts.append(f"{said['intra_bandwidth']} within a node")
        if self.nodes > 1:
            whose = "a node" if self.nic == "shared" else "a device"
            parts.append(f"{said['inter_bandwidth']} {whose} between nodes")
        return ", ".join(parts)


@dataclass(frozen=True)
class ClusterFile:
    """A cluster that was read."""

    spec: ClusterSpec
    """What planning takes."""

    config: ClusterConfig
    """All that the file says, serving's numbers included."""

    name: str
    """The preset's name, or the file's without its ending."""

    note: str = ""
    """The comment at the file's head: where its numbers are from."""


def cluster_names() -> tuple[str, ...]:
    """The presets, by name."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.yaml")))


def load_cluster(
    name_or_path: str | os.PathLike[str], *, nodes: int | None = None, devices_per_node: int | None = None
) -> ClusterFile:
    """Reads a preset, or a cluster file.

    Args:
        nodes, devices_per_node: instead of what the file says.

    Raises:
        ConfigError: no such preset or file, or a key that does not validate; names it and says what would be right.
    """
    name = os.fspath(name_or_path)
    path = _PRESETS / f"{name}.yaml" if name in cluster_names() else Path(name)
    if not path.is_file():
        close = difflib.get_close_matches(name, cluster_names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"{name}: neither a preset nor a file.{hint} Presets: {', '.join(cluster_names())}; "
            "or give the path of a YAML file with nodes, devices_per_node, flops and bandwidths"
        )
    given = {"nodes": nodes, "devices_per_node": devices_per_node}
    config = load_config(ClusterConfig, path, [f"{key}={value}" for key, value in given.items() if value is not None])
    head = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return ClusterFile(config.spec, config, path.stem, "\n".join(line.lstrip("# ") for line in head))


def write_cluster(path: str | os.PathLike[str], config: ClusterConfig, note: str = "") -> None:
    """Writes a cluster file that ``load_cluster`` reads back equal, whole or not at all.

    Args:
        note: where the numbers are from; becomes the comment at its head.
    """
    comment = "".join(f"# {line}\n" for line in note.splitlines())
    write_text(path, comment + yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False))

"""Results as JSON: what a command printed, and what it ran on."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from raymoe.telemetry.files import write_text

_PACKAGES = ("raymoe", "torch", "ray", "transformers", "triton")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide results; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def host() -> dict[str, Any]:
    """The machine in terms that a reader can compare: processor, cores and memory. No names, no addresses, no paths."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
    }


def run_meta(command: str) -> dict[str, Any]:
    """``{command, versions, host, date}``: what every result carries so that it can be compared and repeated."""
    return {
        "command": command,
        "versions": versions(),
        "host": host(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(
    path: str | os.PathLike[str],
    command: str,
    rows: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``{"meta": {command, versions, host, date, ...}, "rows": [...]}``, whole or not at all.

    Args:
        command: the command line that gave the rows.
        rows: a mapping a line of the printed table; numpy values are taken, NaN and infinities become null.
        meta: more entries for ``meta``, for example the seed and the workload.

    Raises:
        ValueError: a value that JSON cannot say, with the place where it stands.
    """
    content = {"meta": run_meta(command) | dict(meta or {}), "rows": list(rows)}
    write_text(path, json.dumps(_plain(content, "result"), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any, place: str) -> Any:
    match value:
        case Mapping():
            return {str(key): _plain(item, f"{place}.{key}") for key, item in value.items()}
        case np.ndarray() | np.generic():
            return _plain(value.tolist(), place)
        case None | str() | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case os.PathLike():
            return os.fspath(value)
        case list() | tuple():
            return [_plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
        case _:
            raise ValueError(f"{place} is a {type(value).__name__}; results hold numbers, text, lists and mappings")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()

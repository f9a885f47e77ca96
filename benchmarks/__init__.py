"""Benchmarks. From a checkout that is not installed they run too, by `python -m benchmarks.NAME` in its root."""

import importlib.util
from pathlib import Path

import raymoe

if any(importlib.util.find_spec(f"raymoe.{part}") is None for part in ("benchmarks", "kernels", "actors")):
    # where an installation puts them, they lie beside `raymoe`
    raymoe.__path__.append(str(Path(__file__).resolve().parents[1]))

"""Which backend computes, and how often each one did."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections import Counter
from functools import cache

import torch

from raymoe.kernels.spec import ExpertSpec, triton_refusal

BACKENDS = ("auto", "triton", "torch", "reference")

_calls: Counter[str] = Counter()
# continuous batching calls the experts from a thread of its own
_calls_lock = threading.Lock()


def calls() -> dict[str, int]:
    """How often each backend ran in this process, by `moe_mlp` or `expert_rows`, e.g. {"triton": 3, "torch": 12}."""
    with _calls_lock:
        return dict(_calls)


def count_call(backend: str) -> None:
    with _calls_lock:
        _calls[backend] += 1


def requested_backend() -> str:
    """What RAYMOE_KERNELS asks for in place of "auto": auto | triton | torch | reference; default auto."""
    name = os.environ.get("RAYMOE_KERNELS", "auto")
    if name not in BACKENDS:
        raise ValueError(f"RAYMOE_KERNELS is {name!r}; use one of {', '.join(BACKENDS)}")
    return name


def is_interpreted() -> bool:
    """Whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1, set before the first import of triton)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose_backend(backend: str, spec: ExpertSpec, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that computes: triton | torch | reference.

    "auto" yields to RAYMOE_KERNELS; else it is Triton on CUDA where the spec and dtype allow it, and torch elsewhere.

    Raises:
        ValueError: an unknown name, or Triton asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    source = "backend='triton'"
    if backend == "auto":
        backend = requested_backend()
        source = "RAYMOE_KERNELS=triton"
    refusal = triton_refusal(spec, dtype)
    if backend == "auto":
        return "triton" if device.type == "cuda" and refusal is None and has_triton() else "torch"
    if backend != "triton":
        return backend
    if not has_triton():
        refusal = "the package triton is not installed"
    elif device.type != "cuda" and not is_interpreted():
        refusal = (
            f"the tensors are on {device.type}; move them to CUDA or set TRITON_INTERPRET=1 before the process starts"
        )
    if refusal is not None:
        raise ValueError(f"{source} cannot run this: {refusal}. Use 'torch' or 'auto'")
    return "triton"

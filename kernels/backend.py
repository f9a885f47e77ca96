"""Which backend computes, why, and how often each one did."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections import Counter
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from raymoe.kernels.spec import ExpertSpec, triton_refusal

BACKENDS = ("auto", "triton", "cpu", "torch", "reference")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_calls: Counter[str] = Counter()
# continuous batching calls the experts from a thread of its own
_calls_lock = threading.Lock()


class Choice(NamedTuple):
    """The backend that computes, and why it and no other."""

    backend: str
    """triton | cpu | torch | reference."""
    why: str


def calls() -> dict[str, int]:
    """How often each backend ran in this process, by `moe_mlp` or `expert_rows`, e.g. {"triton": 3, "torch": 12}.

    Calls that `torch.compile` made part of a graph are not counted.
    """
    with _calls_lock:
        return dict(_calls)


def count_call(backend: str) -> None:
    if not torch.compiler.is_compiling():
        with _calls_lock:
            _calls[backend] += 1


def requested_backend() -> str:
    """What RAYMOE_KERNELS asks for in place of "auto": auto | triton | cpu | torch | reference; default auto."""
    name = os.environ.get("RAYMOE_KERNELS", "auto")
    if name not in BACKENDS:
        raise ValueError(f"RAYMOE_KERNELS is {name!r}; use one of {', '.join(BACKENDS)}")
    return name


def is_interpreted() -> bool:
    """Whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1, set before the first import of triton)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def has_triton() -> bool:
    return _HAS_TRITON


def has_fast_half(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the 16-bit type in hardware (AMX or AVX-512), through oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


@cache
def has_exact_int8() -> bool:
    """Whether this CPU sums products of int8 without saturating: x86 before VNNI adds pairs of them in 16 bits."""
    largest = torch.full((16, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.T) == 64 * 127**2).all())  # pyright: ignore[reportPrivateImportUsage]


def choose_backend(
    backend: str, spec: ExpertSpec, hidden: Tensor, weight: Tensor | None = None, *, needs_grad: bool = False
) -> Choice:
    """The backend that computes rows like `hidden` with weights like `weight` (default: of the same dtype).

    "auto" yields to RAYMOE_KERNELS; else it is Triton on CUDA and, where no gradient is wanted, cpu on a CPU, if they can run
    this; torch if not.

    Raises:
        ValueError: an unknown name, or a backend asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    source = f"backend={backend!r}"
    if backend == "auto":
        backend = requested_backend()
        source = f"RAYMOE_KERNELS={backend}"
    weight_dtype = weight.dtype if weight is not None else hidden.dtype
    if backend == "auto":
        on_cuda = hidden.device.type == "cuda"
        best = "triton" if on_cuda else "cpu"
        refusal = _refusal(best, spec, hidden, weight_dtype, needs_grad)
        where = "on CUDA" if on_cuda else "on a CPU, no gradient wanted"
        return Choice(best, where) if refusal is None else Choice("torch", f"{best} cannot run this: {refusal}")
    refusal = _refusal(backend, spec, hidden, weight_dtype, needs_grad)
    if refusal is not None:
        raise ValueError(f"{source} cannot run this: {refusal}. Use 'torch' or 'auto'")
    return Choice(backend, source)


def _refusal(backend: str, spec: ExpertSpec, hidden: Tensor, weight_dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why a backend cannot run this, or None if it can."""
    if backend == "triton":
        if not has_triton():
            return "the package triton is not installed"
        if hidden.device.type != "cuda" and not is_interpreted():
            return (
                f"the tensors are on {hidden.device.type}; move them to CUDA or set TRITON_INTERPRET=1 before the "
                "process starts"
            )
        return triton_refusal(spec, hidden.dtype, weight_dtype)
    if backend == "cpu":
        return _cpu_refusal(spec, hidden, weight_dtype, needs_grad)
    return None


def _cpu_refusal(spec: ExpertSpec, hidden: Tensor, weight_dtype: torch.dtype, needs_grad: bool) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, and it goes by how many rows each expert has"
    if hidden.device.type != "cpu":
        return f"the tensors are on {hidden.device.type}"
    if needs_grad:
        return "a gradient is wanted"
    if spec.is_transposed:
        return "it wants weights as [E, out, in], spec.is_transposed has [E, in, out]"
    if weight_dtype == torch.float8_e4m3fn:
        return "weights in float8 have no CPU products; quantise to int8"
    if weight_dtype == torch.int8:
        return None if has_exact_int8() else "this CPU has no exact products of int8 (no VNNI)"
    if not has_fast_half(hidden.dtype):
        return f"this CPU has no matrix unit for {hidden.dtype}"
    return None


def sums_in_triton(device: torch.device) -> bool:
    """Whether `combine` runs in Triton: on CUDA unless RAYMOE_KERNELS asks for another, in the interpreter if it asks for it."""
    if not has_triton() or (device.type != "cuda" and not is_interpreted()):
        return False
    requested = requested_backend()
    return requested == "triton" or (requested == "auto" and device.type == "cuda")

"""A checkpoint's weights by name, whatever form they are stored in: plain, FP8 in blocks, or MXFP4.

A quantised weight is two tensors in the files, its codes and their scales; here it is one, and is dequantised as it is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from raymoe.models.tensor_files import Span, TensorFiles

_FP8_SCALE = "_scale_inv"
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"
_FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# E2M1, sign in the highest of four bits (OCP Microscaling Formats v1.0, section 5.3.3)
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127


@dataclass(frozen=True)
class Quantization:
    """How a release was quantised: what its config.json says."""

    method: str
    """fp8 | mxfp4."""
    block: tuple[int, int] = (128, 128)
    """Of FP8: rows and columns of the weight that share one scale."""


class _Stored(NamedTuple):
    codes: str
    scales: str | None
    form: str
    shape: tuple[int, ...]


def quantization_of(config: PretrainedConfig) -> Quantization | None:
    """What the configuration says about quantised weights; None if they are plain.

    Raises:
        ValueError: a form that raymoe does not read; names it.
    """
    entry = getattr(config, "quantization_config", None)
    if entry is None:
        return None
    entry = entry if isinstance(entry, dict) else entry.to_dict()
    method = str(entry.get("quant_method"))
    if method == "mxfp4":
        return Quantization(method)
    if method == "fp8":
        block = entry.get("weight_block_size")
        if not (
            isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
        ):
            raise ValueError(
                f"quantization_config.weight_block_size: got {block}; raymoe reads FP8 weights scaled in blocks, "
                "e.g. [128, 128]"
            )
        return Quantization(method, (block[0], block[1]))
    raise ValueError(
        f"quantization_config.quant_method: '{method}' weights cannot be read expert by expert; raymoe reads plain, fp8 "
        "(block-scaled) and mxfp4. Use the unquantised release, or dequantise it with transformers and save_pretrained()."
    )


class WeightFiles:
    """The weights of a Hugging Face directory by name, dequantised as they are read. Safe to use from several threads.

    Raises:
        ValueError: what `TensorFiles` refuses, or codes without scales, or scales that do not fit; names the tensor.
    """

    def __init__(self, path: Path, quantization: Quantization | None, *, direct_io: bool = False):
        self._files = TensorFiles(path, direct_io=direct_io)
        self.reader = self._files.reader
        self._block = quantization.block if quantization else (0, 0)
        has_mxfp4 = quantization is not None and quantization.method == "mxfp4"
        self._stored: dict[str, _Stored] = {}
        entries = self._files.entries
        for key, entry in entries.items():
            if key.endswith(_FP8_SCALE) and key.removesuffix(_FP8_SCALE) in entries:
                continue
            if has_mxfp4 and key.endswith(_MXFP4_SCALES) and _swap(key, _MXFP4_SCALES, _MXFP4_BLOCKS) in entries:
                continue
            if has_mxfp4 and key.endswith(_MXFP4_BLOCKS):
                self._stored[key.removesuffix(_MXFP4_BLOCKS)] = self._mxfp4(key)
            elif entry.dtype in _FP8_DTYPES:
                self._stored[key] = self._fp8(key, quantization)
            else:
                self._stored[key] = _Stored(key, None, "plain", entry.shape)

        self.shapes = {name: stored.shape for name, stored in self._stored.items()}
        """Of every weight, dequantised."""

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the plain floating-point tensors as they are in the files."""
        found = {name: _DTYPES.get(self._files.entries[stored.codes].dtype) for name, stored in self._stored.items()}
        return {name: dtype for name, dtype in found.items() if dtype is not None}

    def file_of(self, name: str) -> str:
        """Name of the file that holds it, for messages."""
        return self._files.entries[self._stored[name].codes].file.name

    def read(self, name: str, row: int | None = None) -> tuple[Tensor, int]:
        """A weight, or its `row` along the first dimension, and the bytes read. Dequantised weights come in fp32."""
        stored = self._stored[name]
        pieces = [self._files.read(key, row) for key in (stored.codes, stored.scales) if key is not None]
        return self.weight(name, pieces), sum(piece.nbytes for piece in pieces)

    def spans(self, name: str, row: int | None = None) -> tuple[Span, ...]:
        """Where a weight, or its `row`, lies: one span of a plain one, codes and scales of one that is quantised."""
        stored = self._stored[name]
        return tuple(self._files.span(key, row) for key in (stored.codes, stored.scales) if key is not None)

    def weight(self, name: str, pieces: Sequence[Tensor]) -> Tensor:
        """What the contents of its `spans` stand for, each in its span's dtype and shape."""
        stored = self._stored[name]
        if stored.form == "plain":
            return pieces[0]
        codes, scales = pieces
        return dequantize_mxfp4(codes, scales) if stored.form == "mxfp4" else dequantize_fp8(codes, scales, self._block)

    def _fp8(self, key: str, quantization: Quantization | None) -> _Stored:
        entries = self._files.entries
        if quantization is None or quantization.method != "fp8":
            raise ValueError(
                f"tensor '{key}' is FP8, but config.json has no quantization_config that says how it is scaled"
            )
        if key + _FP8_SCALE not in entries:
            raise ValueError(f"tensor '{key}' is FP8, and its scales '{key}{_FP8_SCALE}' are not in the files")
        shape, found = entries[key].shape, entries[key + _FP8_SCALE].shape
        wanted = (*shape[:-2], *(-(-n // block) for n, block in zip(shape[-2:], self._block, strict=True)))
        if found != wanted:
            raise ValueError(f"tensor '{key}{_FP8_SCALE}' has shape {list(found)}; blocks of {list(self._block)} in a weight "
                             f"of {list(shape)} need {list(wanted)}")  # fmt: skip
        return _Stored(key, key + _FP8_SCALE, "fp8", shape)

    def _mxfp4(self, key: str) -> _Stored:
        entries = self._files.entries
        scales = _swap(key, _MXFP4_BLOCKS, _MXFP4_SCALES)
        if scales not in entries:
            raise ValueError(f"tensor '{key}' is MXFP4, and its scales '{scales}' are not in the files")
        shape, found = entries[key].shape, entries[scales].shape
        if len(shape) != 4 or entries[key].dtype != "U8" or found != shape[:-1] or entries[scales].dtype != "U8":
            raise ValueError(f"tensor '{key}' {list(shape)} {entries[key].dtype} with scales {list(found)} "
                             f"{entries[scales].dtype} is not MXFP4: codes are U8 [E, out, groups, bytes], scales U8 "
                             "[E, out, groups]")  # fmt: skip
        num_experts, out_size, groups, group_bytes = shape
        return _Stored(key, scales, "mxfp4", (num_experts, groups * group_bytes * 2, out_size))


def dequantize_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """fp32 [..., out, in] of FP8 `codes` [..., out, in] and one scale for each block of it.

    Args:
        scales: [..., ceil(out / block rows), ceil(in / block columns)]; the stored value is multiplied with the code.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.
    """
    rows, columns = codes.shape[-2:]
    scales = scales.float().repeat_interleave(block[0], -2)[..., :rows, :]
    return codes.float() * scales.repeat_interleave(block[1], -1)[..., :columns]


def dequantize_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 [..., in, out] of MXFP4 `codes` uint8 [..., out, groups, bytes] and their `scales` uint8 [..., out, groups].

    A byte holds two values, the first in its low four bits; a scale is a power of two with a bias of 127. gpt-oss stores
    weights as [out, in] and keeps them in memory as [in, out].

    Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 5.4.1.
    """
    values = torch.tensor(_FP4_VALUES, dtype=torch.float32, device=codes.device)
    pairs = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    weight = torch.ldexp(values[pairs.int()], (scales.int() - _E8M0_BIAS)[..., None])
    return weight.flatten(-2).transpose(-1, -2)


def _swap(key: str, ending: str, other: str) -> str:
    return key.removesuffix(ending) + other

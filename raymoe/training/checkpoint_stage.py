"""Copies of live tensors in host memory, so that training goes on while they are written."""

import torch
from torch import Tensor

# cache lines: the start of a tensor is aligned for every dtype
_ALIGNMENT = 64


class HostStage:
    """One buffer in host memory, pinned where CUDA tensors are copied, reused from copy to copy."""

    def __init__(self):
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._layout: list[tuple[str, torch.Size, torch.dtype, bool]] = []
        self._copies: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `tensors`, contiguous, valid until the next call; returns when they hold the values."""
        layout = [(name, tensor.shape, tensor.dtype, tensor.is_cuda) for name, tensor in tensors.items()]
        if layout != self._layout:
            self._lay_out(tensors)
            self._layout = layout
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._copies[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return self._copies

    def _lay_out(self, tensors: dict[str, Tensor]) -> None:
        starts, end = [], 0
        for tensor in tensors.values():
            starts.append(end)
            end += -(-tensor.numel() * tensor.itemsize // _ALIGNMENT) * _ALIGNMENT
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._copies = {}
        if end > self._buffer.numel() or pinned != self._buffer.is_pinned():
            # the old one goes before the new one comes: together they may not fit
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        self._copies = {
            name: self._buffer[start : start + tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
            for start, (name, tensor) in zip(starts, tensors.items(), strict=True)
        }

"""Find the fastest tile for each GEMM, bucket by bucket, on the device at hand. Offline: no actor ever does this.

E experts, H hidden size, I expert width. A candidate that does not compile, does not fit, spills registers or gives a wrong result
cannot win; the last is reported loudly.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Protocol

import torch

from raymoe.kernels.configs import KINDS, GemmConfig, table_of
from raymoe.kernels.gemm_cases import GemmCase, LayerKind, label, random_index
from raymoe.kernels.stopwatch import interleaved, seconds

_logger = logging.getLogger(__name__)

BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
Table = dict[str, dict[str, dict[int, GemmConfig]]]
Report = Callable[[dict[str, Any]], None]
Trial = Callable[[str, GemmConfig], AbstractContextManager[bool]]

_GATED = ("up", "up_train", "gate_grad")
# relative, of one GEMM on operands of the type
_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# further behind after a first look than noise and other shapes can make up
_HOPELESS = 1.3
_LOOK_S, _ROUND_S = 2e-4, 5e-4
_ROUNDS = 9


class LayerShape(Protocol):
    """A layer to tune for."""

    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def inner_size(self) -> int: ...
    @property
    def top_k(self) -> int: ...


def candidates(kind: str, dtype: torch.dtype, bucket: int) -> list[GemmConfig]:
    """At most a dozen tiles worth timing for about `bucket` rows an expert, the likeliest first.

    Few rows: the weights are what is read, so small row tiles, or swapped operands, whose tensor-core tile is made of weights.
    Many rows: the largest tiles that registers and shared memory allow, by TMA where it serves.
    """
    if dtype == torch.float32:
        rows = 16 if bucket <= 32 else 64
        return [GemmConfig(rows, 64, 32), GemmConfig(rows, 128, 32, 8), GemmConfig(2 * rows, 64, 32, 8)]
    if kind == "weight_grad":
        return _for_sums(bucket)
    if bucket <= 16:
        return _for_few_rows(16)
    if bucket <= 64:
        return _for_some_rows(kind, bucket)
    return _for_many_rows(kind)


def _for_few_rows(rows: int) -> list[GemmConfig]:
    plain = [GemmConfig(rows, 64, 128, 4, 4), GemmConfig(rows, 128, 64, 4, 4), GemmConfig(rows, 64, 64, 4, 5)]
    swapped = [replace(config, is_swapped=True) for config in (*plain, GemmConfig(rows, 128, 128, 8, 3))]
    by_tma = [replace(config, weights="descriptor") for config in (*swapped, plain[0])]
    return [*by_tma, *swapped, *plain]


def _for_some_rows(kind: str, bucket: int) -> list[GemmConfig]:
    slices = 2 if kind in _GATED else 1
    swapped = _for_few_rows(bucket)[:3]
    if kind == "gate_grad":
        # at four warps it spills
        swapped[1] = replace(swapped[1], num_warps=8)
    plain = [GemmConfig(64, 64, 64, 4, 4), GemmConfig(64, 128, 64, 4, 4, slices=slices)]
    by_tma = [replace(config, weights="descriptor") for config in (*plain, replace(plain[1], num_warps=8))]
    small = GemmConfig(32, 128, 64, 4, 4, weights="descriptor")
    return [*swapped, *by_tma, *plain, small, replace(by_tma[1], is_persistent=True)]


def _for_many_rows(kind: str) -> list[GemmConfig]:
    if kind in _GATED:
        slices = 4 if kind == "gate_grad" else 2
        tile, small = GemmConfig(128, 128, 64, 8, 4, slices=slices), GemmConfig(64, 128, 64, 4, 4, slices=slices)
        narrow = GemmConfig(128, 64, 64, 4, 4, slices=slices)
    else:
        tile, small, narrow = (
            GemmConfig(128, 256, 64, 8, 3),
            GemmConfig(64, 256, 64, 4, 4),
            GemmConfig(128, 128, 64, 4, 4),
        )
    by_tma, small, narrow = (replace(config, weights="descriptor") for config in (tile, small, narrow))
    # rows in sorted order already: TMA fetches both; else a separate gather has to pay for itself
    both = replace(by_tma, inputs="descriptor", num_stages=4)
    return [
        by_tma,
        replace(by_tma, is_persistent=True),
        both,
        replace(both, is_persistent=True),
        replace(both, is_persistent=True, is_flattened=True, num_stages=3),
        replace(by_tma, num_stages=by_tma.num_stages - 1, slices=min(4, 2 * by_tma.slices)),
        replace(both, group=4),
        small,
        narrow,
        replace(narrow, inputs="descriptor", is_persistent=True),
        tile,
    ]


def _for_sums(bucket: int) -> list[GemmConfig]:
    """Here rows x cols is a tile of an expert's gradient and `inner` counts its rows."""
    if bucket <= 16:
        return [GemmConfig(128, 128, 16, 8), GemmConfig(128, 128, 16, 4), GemmConfig(64, 128, 16, 4)]
    inner = 32 if bucket <= 32 else 64
    large, square = GemmConfig(128, 256, inner, 8, 3), GemmConfig(128, 128, inner, 8, 3)
    by_tma = [replace(config, inputs="descriptor") for config in (large, square)]
    return [
        *by_tma,
        large,
        square,
        replace(by_tma[0], num_stages=4),
        replace(square, num_warps=4, num_stages=4),
        replace(by_tma[1], num_warps=4, num_stages=4),
        GemmConfig(256, 128, inner, 8, 3, inputs="descriptor"),
        GemmConfig(64, 256, inner, 4, 4),
        replace(large, inner=32, num_stages=4),
    ]


def tune(
    shapes: Sequence[LayerShape],
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    *,
    kinds: Sequence[str] = KINDS,
    buckets: Sequence[int] = BUCKETS,
    report: Report = lambda row: None,
    trial: Trial = lambda kind, config: nullcontext(True),
) -> Table:
    """The table of this device with the winners of `dtype` in it; where time ran out or nothing ran, what it had before.

    Args:
        budget_s: no new contest begins after so many seconds. Large and small buckets take turns, so that both come first.
        report: called with a row {kind, bucket, shape, config, us, error, note} for each candidate, and one for each winner.
        trial: entered around a candidate's first launches, which may end the process; what it yields says whether to try.
    """
    name = str(dtype).removeprefix("torch.")
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    table: Table = {kind: {d: dict(b) for d, b in by.items()} for kind, by in table_of(device_name).items()}
    tuner = _Tuner(shapes, dtype, device, report, trial)
    deadline = time.monotonic() + budget_s
    for bucket in _outside_in(sorted(buckets)):
        for kind in kinds:
            if time.monotonic() > deadline:
                report({"kind": kind, "bucket": bucket, "note": "no time left: as before", "skipped": True})
                continue
            entries = table[kind].setdefault(name, {})
            if (winner := tuner.hold_contest(kind, bucket, entries.get(bucket))) is not None:
                entries[bucket] = winner
                about = {"kind": kind, "bucket": bucket, "dtype": name, "config": label(winner)}
                report({**about, "fields": asdict(winner), "note": "wins"})
    return table


def _outside_in(values: Sequence[int]) -> Iterator[int]:
    left = list(values)
    while left:
        yield left.pop()
        if left:
            yield left.pop(0)


class _Tuner:
    def __init__(
        self, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device, report: Report, trial: Trial
    ) -> None:
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self._report, self._trial = report, trial
        self._spills: dict[tuple[str, GemmConfig], int] = {}

    def hold_contest(self, kind: str, bucket: int, before: GemmConfig | None) -> GemmConfig | None:
        """The candidate with the least product of times over the shapes, among those that ran on all of them."""
        first = [before] if before is not None else []
        alive = dict.fromkeys(dict.fromkeys([*first, *candidates(kind, self._dtype, bucket)]), 0.0)
        measured = 0
        for shape in self._shapes:
            try:
                found = self._times(kind, bucket, shape, list(alive))
            except torch.OutOfMemoryError:
                self._report(
                    {"kind": kind, "bucket": bucket, "shape": _size(shape), "note": "no memory for the operands"}
                )
                continue
            measured += 1
            alive = {config: alive[config] + math.log(taken) for config, taken in found.items()}
        return min(alive, key=lambda config: alive[config]) if alive and measured else None

    def _times(
        self, kind: str, bucket: int, shape: LayerShape, configs: Sequence[GemmConfig]
    ) -> dict[GemmConfig, float]:
        """Median seconds of each candidate that runs and is right; of the hopeless ones a first look."""
        device = self._device
        generator = torch.Generator(device).manual_seed(bucket)
        layer = LayerKind(shape.num_experts, shape.hidden_size, shape.inner_size, self._dtype, device)
        index = random_index(bucket * shape.num_experts, shape.num_experts, shape.top_k, generator)
        case = GemmCase(kind, layer, index, generator)
        about = {"kind": kind, "bucket": bucket, "shape": _size(shape)}
        found: dict[GemmConfig, float] = {}
        for config in configs:
            row = {**about, "config": label(config)}
            with self._trial(kind, config) as is_wanted:
                examined = self._examine(case, config) if is_wanted else "ended the process before"
                if isinstance(examined, str):
                    self._report({**row, "note": examined})
                else:
                    found[config], error = examined
                    self._report({**row, "us": found[config] * 1e6, "error": error, "note": "first look"})
        best = min(found.values(), default=1.0)
        close = [config for config, look in found.items() if look <= _HOPELESS * best]
        works = {label(config): partial(case.run, config) for config in close}
        calls = _repeats(best, _ROUND_S)
        rounds = interleaved(works, device, rounds=_ROUNDS, calls=calls, is_queued=True) if works else {}
        for config in close:
            times = rounds[label(config)]
            found[config] = statistics.median(times)
            result = {"us": found[config] * 1e6, "tflops": case.flops / found[config] / 1e12}
            spread = (max(times) - min(times)) / found[config]
            self._report({**about, "config": label(config), **result, "spread": spread, "note": "median"})
        return found

    def _examine(self, case: GemmCase, config: GemmConfig) -> tuple[float, float] | str:
        """(seconds at a first look, error), or why the candidate is out."""
        device, limit = self._device, _LIMITS[self._dtype]
        known = _compiled(device)
        try:
            error = case.error(config, case.some_experts())
        except Exception as failure:
            # a context that an illegal access has ended raises again: the caller must know
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return f"{type(failure).__name__}: {' '.join(str(failure).split())[:120]}"
        if new := _compiled(device).keys() - known.keys():
            spills = sum(getattr(kernel, "n_spills", 0) or 0 for at, kernel in _compiled(device).items() if at in new)
            self._spills[case.kind, config] = max(spills, self._spills.get((case.kind, config), 0))
        if (spills := self._spills.get((case.kind, config), 0)) > 0:
            return f"spills {spills} registers"
        if not error <= limit:
            _logger.error("WRONG RESULT: %s with %s has error %.1e, limit %.1e", case.kind, label(config), error, limit)
            return f"WRONG RESULT: error {error:.1e}"
        look = seconds(partial(case.run, config), device, is_queued=True)
        return seconds(partial(case.run, config), device, _repeats(look, _LOOK_S), is_queued=True), error


def _repeats(one_s: float, wanted_s: float) -> int:
    return max(1, min(20, round(wanted_s / max(one_s, 1e-9))))


def _size(shape: LayerShape) -> str:
    return f"E{shape.num_experts} H{shape.hidden_size} I{shape.inner_size}"


def _compiled(device: torch.device) -> dict[int, Any]:
    """The GEMM kernels that this process has loaded so far, by identity; none where the interpreter is at work."""
    from triton.runtime.jit import JITFunction

    from raymoe.kernels import gmm, gmm_gate, gmm_gate_grad, gmm_k

    if device.type != "cuda":
        return {}
    number = device.index if device.index is not None else torch.cuda.current_device()
    functions = {
        id(item): item
        for module in (gmm, gmm_gate, gmm_gate_grad, gmm_k)
        for item in vars(module).values()
        if isinstance(item, JITFunction)
    }
    return {
        id(kernel): kernel
        for function in functions.values()
        if number in function.device_caches
        for kernel in function.device_caches[number][0].values()
    }

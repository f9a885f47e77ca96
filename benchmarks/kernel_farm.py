"""Compile ahead, in many processes, what checks, tuning and timing will launch: one process compiles one kernel at a time.

    python -m benchmarks.kernel_farm --shard 0 --of 12 [--tune]

Each process takes its share and leaves it in Triton's cache. A failure costs only its own piece.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from raymoe.benchmarks.kernel_jobs import describe
from raymoe.benchmarks.kernel_rivals import AUTOTUNED, RIVALS, SEARCHED_SHAPES, autotuners, make_batch
from raymoe.benchmarks.kernel_shapes import SHAPES, Shape
from raymoe.kernels.configs import KINDS, GemmConfig, table_of
from raymoe.kernels.gemm_cases import LayerKind, compile_gemms, label
from raymoe.kernels.tuner import BUCKETS, candidates

# a rival's own search is cut into so many pieces
_SLICES = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", type=int, required=True)
    parser.add_argument("--of", type=int, required=True)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--deadline", type=float, default=float("inf"))
    arguments = parser.parse_args()
    for name, work in list(pieces(torch.device("cuda"), with_candidates=arguments.tune))[
        arguments.shard :: arguments.of
    ]:
        if time.time() > arguments.deadline:
            break
        started = time.perf_counter()
        try:
            work()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{name}: {describe(error)}", file=sys.stderr)
        torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


def pieces(device: torch.device, *, with_candidates: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what to call), the same list in every process."""
    shapes = [SHAPES[name] for name in (*SEARCHED_SHAPES, "vllm-44818")]
    table = table_of(torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    # a tile is compiled once for most shapes: they belong into one process, which then finds it
    for kind in KINDS:
        configs = dict.fromkeys(table[kind]["bfloat16"].values())
        if with_candidates:
            configs |= dict.fromkeys(c for bucket in BUCKETS for c in candidates(kind, torch.bfloat16, bucket))
        for config in configs:
            yield f"{kind} {label(config)}", partial(_compile_gemm, kind, config, shapes, device)
    for shape in (SHAPES[name] for name in SEARCHED_SHAPES):
        for name in AUTOTUNED:
            for at in range(_SLICES):
                yield f"{name} {shape.name} {at}", partial(_compile_rival, name, shape, at, device)


def _compile_gemm(kind: str, config: GemmConfig, shapes: list[Shape], device: torch.device) -> None:
    for shape in shapes:
        layer = LayerKind(shape.num_experts, shape.hidden_size, shape.inner_size, torch.bfloat16, device)
        compile_gemms(layer, [kind], {kind: [config]}, shape.top_k)


def _compile_rival(name: str, shape: Shape, at: int, device: torch.device) -> None:
    """One slice of the rival's search, on a few experts and tokens of the shape."""
    run = RIVALS[name].load()
    searches = autotuners(name)
    whole = [list(search.configs) for search in searches]
    # what a launch is compiled for: whether a number divides by 16
    few = replace(shape, num_experts=16 if shape.num_experts % 16 == 0 else 2)
    try:
        for search, configs in zip(searches, whole, strict=True):
            search.configs = configs[at::_SLICES] or configs[:1]
            search.cache.clear()
        batch = make_batch(few, 256, torch.bfloat16, torch.Generator(device).manual_seed(0))
        run(batch, True)
    finally:
        for search, configs in zip(searches, whole, strict=True):
            search.configs = configs
            search.cache.clear()


if __name__ == "__main__":
    main()

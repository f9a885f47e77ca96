"""Is every GEMM right in every tile that the tables hold: against float32, over NaN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from raymoe.benchmarks.kernel_checks import ALIGNED, ODD, SPECS, TINY, limit_of, poisoned_memory, verdict
from raymoe.benchmarks.kernel_jobs import Journal
from raymoe.benchmarks.kernel_shapes import routing
from raymoe.kernels.configs import INTERPRETED, KINDS, GemmConfig, table_of
from raymoe.kernels.gemm_cases import GemmCase, LayerKind, label


def check_gemm(kind: str, config: GemmConfig, dtype: torch.dtype, device: torch.device, journal: Journal) -> None:
    """One tile of one GEMM: sizes that tiles divide and sizes that they do not, plain and with everything."""
    plain, full = (ALIGNED, "silu", False), (ODD, "gpt-oss", True)
    tokens = 700
    if device.type != "cuda":
        plain, full, tokens = (TINY, "silu", False), (TINY, "gpt-oss", True), 20
    for (shape, spec, has_extras), distribution in ((plain, "balanced"), (plain, "zipf"), (full, "uniform")):
        generator = torch.Generator(device).manual_seed(3)
        layer = LayerKind(
            shape.num_experts,
            shape.hidden_size,
            shape.inner_size,
            dtype,
            device,
            SPECS[spec],
            has_bias=has_extras,
            has_scale=has_extras,
        )
        index, _ = routing(shape, tokens, distribution, generator)
        with poisoned_memory():
            case = GemmCase(kind, layer, index, generator)
            error = case.error(config, range(shape.num_experts))
        title = f"{kind}, {str(dtype).removeprefix('torch.')}, {shape.name} {distribution}, {spec}, {label(config)}"
        journal.add(verdict(title, error, limit_of(dtype)))


def gemm_checks(device: torch.device) -> dict[str, Callable[[Journal], None]]:
    """Name -> what runs it: every tile of the tables in force, by kind and type."""
    if device.type == "cuda":
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        tables = [table_of(""), table_of(torch.cuda.get_device_name(device))]
    else:
        dtypes, tables = (torch.float32,), []
    checks: dict[str, Callable[[Journal], None]] = {}
    for kind in KINDS:
        for dtype in dtypes:
            entries = [c for table in tables for c in table[kind][str(dtype).removeprefix("torch.")].values()]
            for config in dict.fromkeys(entries or [INTERPRETED[kind]]):
                checks[f"gemm/{kind}/{dtype}/{label(config)}"] = partial(check_gemm, kind, config, dtype, device)
    return checks

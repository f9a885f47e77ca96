"""`raymoe bench`: the benchmarks of this machine, as commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rich.console import Console


def bench_kernels(
    shapes: str | None, tokens: str | None, tune: bool, output: Path, console: Console, json: Path | None
) -> None:
    """Times the expert kernels: on CUDA what `raymoe.benchmarks.kernels_gpu` plans, else the CPU's table.

    Raises:
        ValueError: `tune` without CUDA, shapes or tokens with it, an unknown shape, or a bad number of tokens.
        RunFailed: a correctness check failed.
    """
    if torch.cuda.is_available():
        _on_cuda(shapes, tokens, tune, output, json)
        return
    from raymoe.benchmarks import kernels_cpu as benchmark

    if tune:
        raise ValueError("--tune finds tiles for the Triton kernels and needs a CUDA device; there is none here")
    benchmark.run(
        [benchmark.shape_of(name) for name in (shapes.split(",") if shapes else benchmark.DEFAULT_SHAPES)],
        _numbers("--tokens", tokens) if tokens else benchmark.TOKENS,
        benchmark.STEP_TOKENS if tokens is None else (),
        21,
        console,
        json=json,
    )


def bench_train(
    workers: int,
    loads: str,
    policies: str | None,
    rivals: str,
    steps: int,
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Times training; see `raymoe.benchmarks.train`. Raises: ValueError, an unknown name."""
    from raymoe.benchmarks import train as benchmark

    names = policies.split(",") if policies else list(benchmark.POLICIES)
    others = [name for name in rivals.split(",") if name]
    benchmark.run(workers, names, loads.split(","), others, steps, console, command, json)


def bench_elastic(
    workers: int,
    kills: int,
    snapshots: str,
    dense: str,
    dtype: str,
    seed: int,
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Kills workers; see `raymoe.benchmarks.elastic`. Raises: ValueError, a bad interval."""
    from raymoe.benchmarks import elastic as benchmark

    if snapshots != "auto" and not snapshots.isdigit():
        raise ValueError(f"--snapshots is {snapshots!r}; give 'auto' or a number of steps")
    every = snapshots if snapshots == "auto" else int(snapshots)
    benchmark.run(workers, kills, every, dense, dtype, seed, console, command, json)


def bench_inference(
    arms: str | None,
    budgets: str,
    batches: str,
    rounds: int,
    tokens: int,
    rivals: str,
    crowded: str,
    dtype: str,
    folder: Path | None,
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Compares engines; see `raymoe.benchmarks.inference`. Raises: ValueError, an unknown arm or a bad number."""
    from raymoe.benchmarks import inference as benchmark
    from raymoe.benchmarks.inference_arms import ARMS

    names = arms.split(",") if arms else list(ARMS)
    percents, sizes = _numbers("--budgets", budgets), _numbers("--batches", batches)
    others = _numbers("--rivals", rivals) if rivals else []
    crowds = _numbers("--crowded", crowded) if crowded else []
    benchmark.run(names, percents, sizes, rounds, tokens, others, crowds, dtype, folder, console, command, json)


def bench_engines(batches: str, rounds: int, tokens: int, console: Console, command: str, json: Path | None) -> None:
    """Compares the engine with transformers; see `raymoe.benchmarks.inference_engines`. Raises: ValueError, a bad number."""
    from raymoe.benchmarks import inference_engines as benchmark

    benchmark.run(_numbers("--batches", batches), rounds, tokens, console, command, json)


def bench_quality(experiments: str | None, seeds: int, console: Console, command: str, json: Path | None) -> None:
    """Runs experiments; see `raymoe.benchmarks.quality_compression`. Raises: ValueError, an unknown one."""
    from raymoe.benchmarks import quality_compression as benchmark
    from raymoe.telemetry import write_json

    known = benchmark.experiments()
    names = experiments.split(",") if experiments else list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"--experiments: {name!r} is not known; there are: {', '.join(known)}")
    rows = []
    for name in names:
        console.print(f"[bold]{name}[/bold]")
        rows += known[name](range(seeds), say=lambda line: console.print(line, highlight=False, markup=False))
    if json is not None:
        write_json(json, command, rows)


def bench_cache(
    model: Path,
    data: str,
    sequences: int,
    sequence_length: int,
    batches: str,
    budgets: str,
    tokens: int,
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Replays cache policies; see `raymoe.benchmarks.cache_policies`. Raises: ValueError, a bad number or a bad model."""
    from raymoe.benchmarks import cache_policies as benchmark

    sizes, percents = _numbers("--batches", batches), _numbers("--budgets", budgets)
    benchmark.run(model, data, sequences, sequence_length, sizes, percents, tokens, console, command, json)


def _on_cuda(shapes: str | None, tokens: str | None, tune: bool, output: Path, json: Path | None) -> None:
    from raymoe.benchmarks import kernels_gpu
    from raymoe.errors import RunFailed

    if shapes or tokens:
        raise ValueError("--shapes and --tokens are for the CPU's table; on CUDA the sizes are those of the targets")
    code = kernels_gpu.main(["--out", str(output), *(["--tune"] if tune else [])])
    if json is not None:
        shutil.copyfile(output / "results.json", json)
    if code:
        raise RunFailed(f"a check failed or a phase did not run (code {code}); see {output}")


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{option} is {text!r}; give whole numbers from 1, comma-separated: 1,16,512")
    return numbers

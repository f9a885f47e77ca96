"""Runs a function on several ranks, each a process of its own, without Ray."""

import functools
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from raymoe.training.world import join_world, leave_world


@functools.cache
def _process(_rank: int) -> ProcessPoolExecutor:
    """One process a rank, kept for the whole test run: starting it imports torch and transformers."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """`function(join, rank, *args)` on `size` ranks; `join(node)` forms a fresh world. Returns what each rank returned."""
    with tempfile.TemporaryDirectory() as folder:
        futures = [_process(rank).submit(_run, rank, size, folder, function, args) for rank in range(size)]
        return [future.result(timeout_s) for future in futures]


def _run(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple) -> Any:
    torch.set_num_threads(1)
    worlds = 0

    def join(node: str = "node-0"):
        nonlocal worlds
        leave_world()
        worlds += 1
        return join_world(f"file://{folder}/world{worlds}", rank, size, timeout_s=30, node=node)

    try:
        return function(join, rank, *args)
    finally:
        leave_world()

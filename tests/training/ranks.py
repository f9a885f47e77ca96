"""Runs a function on several ranks, each a process of its own, without Ray."""

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from raymoe.training.world import join_world, leave_world


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60) -> list[Any]:
    """`function(join, rank, *args)` on `size` ranks; `join()` forms a fresh world. Returns what each rank returned."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_rank, (size, folder, function, args), nprocs=size, join=False)
        while not context.join(timeout=timeout_s):
            pass
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]
    failures = [result["error"] for result in results if "error" in result]
    assert not failures, "\n".join(failures)
    return [result["value"] for result in results]


def _rank(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    worlds = 0

    def join():
        nonlocal worlds
        leave_world()
        worlds += 1
        return join_world(f"file://{folder}/world{worlds}", rank, size, timeout_s=30)

    try:
        result = {"value": function(join, rank, *args)}
    except Exception:
        result = {"error": f"rank {rank}: {traceback.format_exc()}"}
    finally:
        leave_world()
    torch.save(result, Path(folder) / f"{rank}.pt")

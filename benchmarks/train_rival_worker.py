"""One rank of a training rival: a process that runs steps when it is told to and sleeps in between.

    python -m raymoe.benchmarks.train_rival_worker FD

Started by `train_rivals.RivalGroup`; FD is its end of a `multiprocessing.Pipe`.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from datetime import timedelta
from importlib import metadata
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from raymoe.benchmarks.train_rival_common import Done, Start, Step, Steps
from raymoe.benchmarks.train_workload import TrainWorkload
from raymoe.training.held_memory import HeldMemory


def serve(connection: Connection) -> None:
    """Runs what comes until the other end closes."""
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    start: Start = connection.recv()
    try:
        if workers > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=start.timeout_s))
        memory = HeldMemory()
        step = importlib.import_module(start.module).build(start.workload, rank, workers, **start.options)
        connection.send(Done(versions={name: metadata.version(name) for name in start.packages}))
        while True:
            try:
                command: Steps = connection.recv()
            except EOFError:
                return
            connection.send(_run(step, command, start.workload, rank, workers))
            # it may be long until the next turn, and others are in memory beside it
            memory.give_back()
    except Exception:
        connection.send(Done(error=traceback.format_exc()))


def _run(step: Step, command: Steps, workload: TrainWorkload, rank: int, workers: int) -> Done:
    seconds, losses = [], []
    share = workload.sequences // workers
    for number in range(command.first, command.first + command.count):
        tokens = workload.batch(number)[rank * share : (rank + 1) * share]
        choices = workload.choices_of(command.load, number, rank, workers)
        if dist.is_initialized():
            dist.barrier()
        started = time.perf_counter()
        losses.append(step(tokens, choices))
        seconds.append(time.perf_counter() - started)
    return Done(seconds=seconds, losses=losses)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    # libraries leave threads behind that would hold the process
    os._exit(0)

"""Runs on a cluster of several nodes, and what the tests ask of all of them."""

import importlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import torch
from ray.cluster_utils import Cluster

from raymoe.actors.elastic_log import RunEvent
from raymoe.training.world import join_world, leave_world
from tests.actors.conftest import TINY
from tests.actors.elastic.traps import FAMILY, Wide

PATIENCE_S = 90
SEED = int(os.environ.get("RAYMOE_TEST_SEED", "0"))
NUM_NODES = 3
TOLERANCE = 1e-7
"""Of a loss in float64: another number of workers adds the same gradients in another order."""
# a schedule that does not ask how many steps there will be, and a rate at which undisturbed runs of one and of three ranks agree to
# 6e-16 in each of 1,100 steps (measured)
OPTIMIZER = {"lr": 2e-4, "warmup_steps": 2, "schedule": "constant"}
# in float64: what rounding leaves must not grow to where it hides a mistake
MODEL = {"config": TINY, "dtype": "float64"}
ELASTIC = {
    "model": MODEL,
    "workers": {"min": 1, "max": 3},
    "snapshots": {"every": 4},
    "steps": 100_000,
    "heartbeat_s": 3,
    "optimizer": OPTIMIZER,
}


class Run:
    """Reads a run's steps until something has happened."""

    def __init__(self, group, patience_s: float = PATIENCE_S):
        self.group, self.steps, self._stream, self._patience_s = group, [], group.train(), patience_s

    @property
    def known(self) -> int:
        """The number that the next event will have, as far as events have been read."""
        return len(self.group.events)

    def kinds(self, known: int = 0) -> list[str]:
        """Of the events from `known` on."""
        return [event.kind for event in self.group.events[known:]]

    def read(self, number: int) -> None:
        """The next steps."""
        for _ in range(number):
            self.steps.append(next(self._stream))

    def until(self, kind: str, known: int) -> RunEvent:
        """The first event of a kind after the `known` first ones."""
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            for event in self.group.events[known:]:
                if event.kind == kind:
                    return event
            self.read(1)
        raise AssertionError(f"no {kind}; there were {[event.text for event in self.group.events]}")

    def when(self, is_so) -> None:
        """Reads steps until something is so."""
        end = time.monotonic() + self._patience_s
        while not is_so():
            assert time.monotonic() < end, [event.text for event in self.group.events]
            self.read(1)

    def with_workers(self, number: int) -> None:
        """Reads steps until one was done by so many."""
        self.when(lambda: self.steps[-1].workers == number)


def set_nodes(cluster: Cluster, number: int) -> None:
    """So many nodes for workers, of one CPU each, whatever was there before."""
    while len(cluster.worker_nodes) > number:
        cluster.remove_node(next(iter(cluster.worker_nodes)))
    while len(cluster.worker_nodes) < number:
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()


def raymoe(cluster: Cluster, *arguments: str, timeout_s: float = PATIENCE_S) -> str:
    """What the command prints, in a process of its own."""
    command = [sys.executable, "-m", "raymoe", *arguments]
    env = os.environ | {"RAY_ADDRESS": cluster.address, "COLUMNS": "160"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Undisturbed:
    """The run in which nothing happens, in this process and alone: its losses, as far as somebody has asked."""

    def __init__(self, job, folder):
        torch.manual_seed(0)
        world = join_world(f"file://{folder}/undisturbed", 0, 1, timeout_s=PATIENCE_S)
        with _wide():
            self._trainer = job.start_trainer(world, job.first_publication((0,)), None)
        leave_world()
        self._losses: list[float] = []

    def losses(self, number: int) -> list[float]:
        """Of the first steps."""
        with _wide():
            while len(self._losses) < number:
                self._losses.append(self._trainer.step(len(self._losses)).loss)
        return self._losses[:number]


@contextmanager
def _wide():
    """Computes as the workers do."""
    module = importlib.import_module(FAMILY)
    narrow, module.torch = module.torch, Wide(module.torch)
    try:
        yield
    finally:
        module.torch = narrow


def check_losses(undisturbed: Undisturbed, steps) -> None:
    """Every step was done once, and its loss is that of a run in which nothing happened.

    Args:
        steps: with `step` and `loss` each.
    """
    assert [step.step for step in steps] == list(range(len(steps)))
    apart = [abs(step.loss / loss - 1) for step, loss in zip(steps, undisturbed.losses(len(steps)), strict=True)]
    assert max(apart) <= TOLERANCE, [f"from {i}: {max(apart[i : i + 50]):.0e}" for i in range(0, len(apart), 50)]

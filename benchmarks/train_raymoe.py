"""raymoe's own arm of the training benchmark: real actors on the fixed workload, one group of workers a policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from raymoe.actors import StepSummary, WorkerGroup
from raymoe.benchmarks.train_workload import WORKLOAD, TrainWorkload
from raymoe.config import TrainConfig, parse_config
from raymoe.models.forced_routing import force_routing
from raymoe.training.batches import Batch
from raymoe.training.job import TrainJob, job_fields
from raymoe.training.publication import Publication
from raymoe.training.trainer import Trainer
from raymoe.training.world import World

MEASURING_STEPS = 8
"""Until links and times have been published and applied."""
APPLYING_STEPS = 2
"""Until a publication is applied, and memory made for it."""


@dataclass(frozen=True)
class BenchJob(TrainJob):
    """A run whose batches and routing are the workload's. Which load a step has goes by its number."""

    given: TrainWorkload = WORKLOAD
    loads: tuple[str, ...] = ("balanced",)
    block: int = 1
    """Steps of one load before the next."""

    def batches(self) -> Callable[[int], Batch]:
        def batch(step: int) -> Batch:
            tokens = self.given.batch(step)
            return Batch(tokens, torch.ones(len(tokens), self.given.sequence_length, dtype=torch.bool))

        return batch

    def start_trainer(self, world: World, publication: Publication, resumes: Path | None) -> Trainer:
        trainer = super().start_trainer(world, publication, resumes)

        def choose(layer: int, _call: int, _num_tokens: int) -> torch.Tensor:
            step = trainer.next_step
            if choices.step != step:
                choices.step = step
                choices.of_layers = self.given.choices_of(self.load_of(step), step, world.rank, world.size)
            return choices.of_layers[layer]

        choices = _Choices()
        # for as long as the trainer lives: its hooks go with it
        choices.forced = force_routing(trainer.model, choose)
        choices.forced.__enter__()
        return trainer

    def load_of(self, step: int) -> str:
        return self.loads[min(step // self.block, len(self.loads) - 1)]


@dataclass
class _Choices:
    step: int = -1
    of_layers: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    forced: AbstractContextManager | None = None


class RaymoeGroup:
    """One group of workers that follows one policy after another. A context manager, inside a Ray session.

    Policies take turns on the same processes and experts, which change no homes: those that live by re-sharding are not for this.
    """

    def __init__(self, workers: int, folder: Path, loads: tuple[str, ...], block: int, given: TrainWorkload = WORKLOAD):
        self.workers = workers
        path = folder / "model"
        given.model().save_pretrained(path)
        tree = {
            "model": {"path": str(path), "dtype": "bfloat16"},
            "data": {"sequence_length": given.sequence_length},
            # links and times are measured for it, and hold for the others
            "experts": {"policy": "fssdp", "reshard_every": 0},
            "workers": workers,
            "batch": given.sequences,
            "snapshots": {"every": 0},
            "steps": 1_000_000,
            "optimizer": {
                "lr": given.learning_rate,
                "weight_decay": given.weight_decay,
                "clip_norm": given.clip_norm,
                "betas": [0.9, 0.999],
                "warmup_steps": 0,
                "schedule": "constant",
            },
            "output": str(folder / "run"),
        }
        config = parse_config(TrainConfig, tree)
        fields = job_fields(config, Path(config.output), path)
        self.group = WorkerGroup(BenchJob(**fields, given=given, loads=loads, block=block))

    def __enter__(self) -> RaymoeGroup:
        transformers_logging.set_verbosity_error()
        self.group.__enter__()
        self.group.start()
        return self

    def __exit__(self, *error) -> None:
        self.group.__exit__(*error)

    def steps(self, count: int) -> list[StepSummary]:
        """Runs the next steps."""
        return self.group.advance(count)

    def follow(self, policy: str) -> None:
        """Takes another policy, `name` or `name:dispatch`, and runs the two steps after which it holds."""
        name, _, dispatch = policy.partition(":")
        self.group.publish(policy=name, dispatch=dispatch or None)
        self.steps(APPLYING_STEPS)

    def state_bytes(self) -> list[dict[str, int]]:
        """Parameters, gradients, optimizer and copies of every worker, as they are now."""
        return [state.state_bytes for state in self.group.states()]

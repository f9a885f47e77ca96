"""A trainer's whole state as a checkpoint sees it, and a trainer set to go on from one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymoe.placement import Base, ClusterSpec, Workload
from raymoe.training.checkpoint import CheckpointError, load, read_common
from raymoe.training.publication import Publication
from raymoe.training.trainer import Trainer


class TrainerState:
    """Implements `checkpoint.TrainState` for a rank."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._generators = {"cpu": torch.get_rng_state()}
        if trainer.world.device.type == "cuda":
            self._generators["cuda"] = torch.cuda.get_rng_state(trainer.world.device)

    def dense(self) -> dict[str, Tensor]:
        return self._trainer.dense.tensors()

    def experts(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        experts = self._trainer.experts
        kinds = experts.optimizer.tensors()
        return {place: {kind: rows[slot] for kind, rows in kinds.items()} for place, slot in experts.pool.slots.items()}

    def common(self) -> dict[str, object]:
        placing = self._trainer.placing
        return {
            "next_step": self._trainer.next_step,
            "owners": placing.base.owners,
            "resident": placing.base.resident,
            "history": np.array(placing.history, dtype=np.int64).reshape(-1, *placing.base.owners.shape),
            "steps_since_reshard": placing.steps_since_reshard,
            "publication": asdict(placing.publications.applied),
            "run": self._trainer.config.identity,
        }

    def own(self) -> dict[str, Tensor]:
        self._generators["cpu"].copy_(torch.get_rng_state())
        if "cuda" in self._generators:
            self._generators["cuda"].copy_(torch.cuda.get_rng_state(self._trainer.world.device))
        return self._generators

    def apply_generators(self) -> None:
        """Sets the random generators to what `own` held when it was loaded."""
        torch.set_rng_state(self._generators["cpu"])
        if "cuda" in self._generators:
            torch.cuda.set_rng_state(self._generators["cuda"], self._trainer.world.device)


def saved_placement(path: Path, size: int) -> tuple[Publication, Base] | None:
    """What the ranks of a checkpoint planned from and where their experts lived; None if it was saved by another number of
    ranks, to whom both say nothing.

    Raises:
        CheckpointError: the checkpoint cannot be used.
    """
    common = read_common(path)
    resident: Any = common["resident"]
    if resident.shape[2] != size:
        return None
    owners: Any = common["owners"]
    saved: Any = common["publication"]
    fields: dict[str, Any] = {**saved}
    fields["cluster"] = ClusterSpec(**fields["cluster"])
    fields["workload"] = Workload(**fields["workload"])
    return Publication(**fields), Base(owners, resident)


def restore(trainer: Trainer, path: Path) -> bool:
    """Sets a fresh trainer to the state in a checkpoint; all ranks call it.

    Returns:
        Whether it goes on bit for bit: as many ranks as saved it, with their random generators.

    Raises:
        CheckpointError: the checkpoint cannot be used, or is of another run: another seed, batch or schedule.
    """
    state = TrainerState(trainer)
    loaded = load(path, state, rank=trainer.world.rank, size=trainer.world.size, group=trainer.world.dense)
    common: dict[str, Any] = dict(loaded.common)
    for key, value in trainer.config.identity.items():
        if common["run"].get(key) != value:
            raise CheckpointError(
                f"{path}: is of a run with {key} = {common['run'].get(key)!r}, this one has {value!r}; a run goes on with the "
                "same data in the same order, or starts anew in another folder"
            )
    trainer.next_step = common["next_step"]
    trainer.placing.history.extend(common["history"])
    trainer.placing.steps_since_reshard = common["steps_since_reshard"]
    trainer.dense.refresh()
    trainer.experts.optimizer.refresh(trainer.experts.pool.slots.values())
    if loaded.own_restored:
        state.apply_generators()
    return loaded.own_restored

"""The actor that holds some of a model's experts in memory, for engines on its node and others."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from raymoe import env
from raymoe.actors.host_directory import HostState

if TYPE_CHECKING:
    from raymoe.inference.holding import Computed
    from raymoe.inference.remote import Parcel


@ray.remote(concurrency_groups={"give": 2, "compute": 1, "control": 2})  # pyright: ignore[reportCallIssue]  (Ray's overloads lack concurrency_groups)
class ExpertHost:
    """Reads the experts it is told to hold in the background, and serves what it has already.

    Args:
        number: by which the directory knows it.
        model: the checkpoint, where its node sees it.
        memory: see `Holding`.
        dtype: of the engines' computation, a name of torch's.
        precision: that experts are held in, as engines hold them.
    """

    def __init__(self, number: int, model: Path, memory: str | int, dtype: str, precision: str):
        # not at the top: who makes hosts must not wait for torch
        import torch

        from raymoe.inference.holding import Holding
        from raymoe.inference.opening import open_model
        from raymoe.inference.tiers import Tiers

        logging.basicConfig(level=env.log_level())
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        self._number = number
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        opened = open_model(model, getattr(torch, dtype), direct_io=True, precision=precision)
        # the layers know the model that they belong to, and it is nobody's here
        torch.nn.Module.to(opened.model, "meta")
        self._holding = Holding(
            opened.layers,
            Tiers(opened.tiers),
            memory=memory,
            dtype=getattr(torch, dtype),
            precision=opened.precision,
            device=device,
        )
        self._speed: tuple[float, float] | None = None

    def __repr__(self) -> str:
        return f"ExpertHost[{self._number}]"

    @ray.method(concurrency_group="give")
    def give(self, keys: Sequence[tuple[int, int]]) -> list[Parcel | None]:
        """Experts, as (layer, expert); None for those that it does not hold."""
        return self._holding.give(keys)

    @ray.method(concurrency_group="give")
    def echo(self, payload: np.ndarray, num_bytes: int) -> np.ndarray:
        """Some bytes for some bytes: to measure the way."""
        return np.zeros(num_bytes, dtype=np.uint8)

    @ray.method(concurrency_group="compute")
    def compute(
        self, layer: int, rows: np.ndarray, dtype: str, experts: Sequence[int], counts: Sequence[int]
    ) -> Computed:
        """Rows through its experts, see `Holding.compute`. Raises: NotHeld."""
        import torch

        return self._holding.compute(layer, rows, getattr(torch, dtype), experts, counts)

    @ray.method(concurrency_group="control")
    def hold(self, keys: Sequence[tuple[int, int]]) -> None:
        """Replaces what it is to hold, hottest first."""
        self._holding.hold(keys)

    @ray.method(concurrency_group="control")
    def held(self) -> np.ndarray:
        """bool [L, E]: what can be asked for now."""
        return self._holding.held()

    @ray.method(concurrency_group="control")
    def facts(self) -> dict[str, Any]:
        """Plain values for statistics."""
        return self._holding.facts()

    @ray.method(concurrency_group="control")
    def state(self, known_changes: int) -> HostState:
        """All of it. `known_changes`: of the last state that the caller has seen."""
        holding = self._holding
        if self._speed is None:
            self._speed = holding.compute_speed()
        changes = holding.changes
        return HostState(
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
            handle=holding.handle,
            num_experts=holding.num_experts,
            num_slots=holding.num_slots,
            changes=changes,
            held=holding.held() if changes != known_changes else None,
            speed=self._speed,
            call_bytes=holding.call_bytes,
            is_settled=holding.is_settled,
            facts=holding.facts(),
        )

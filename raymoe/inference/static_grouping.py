"""Which sequences of a unit share a static batch at the next step: ExpertFlow's token scheduler in its own setting (arXiv
2410.17954, section on the Token Scheduler), where a unit is two or more batches that decode side by side.

R sequences, L MoE layers of the decoder, E experts a layer, B sequences a batch may hold, G batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymoe.inference.batch_judge import BatchJudge
from raymoe.inference.grouping import Groups, arrival, cost, greedy, kmedoids
from raymoe.inference.predictors.path_predictor import PathPredictor
from raymoe.inference.routes import LastPaths, Paths


@dataclass(frozen=True)
class UnitOptions:
    """How batches exchange sequences.

    Raises:
        ValueError: a value out of range; names it.
    """

    method: Literal["kmedoids", "greedy"] = "kmedoids"
    """The first is ExpertFlow's, the second quicker."""
    margin: float = 0.02
    """Share of the bytes to fetch that new batches must be expected to save, and that must be seen to be saved."""
    copy_cost: float = 0.25
    """What a byte of keys and values that goes to another batch costs, beside a byte of an expert that is fetched."""
    stride: int = 8
    """Steps that a batch computes before the next one has its turn. The paper's is 1, which costs a small cache what it holds for
    one batch whenever the other comes."""
    window_steps: int = 32
    """Forward passes of batches after which is judged whether it pays."""
    busy_share: float = 0.9
    """If batches use that share of all experts in any order, there is nothing to choose."""

    def __post_init__(self):
        if self.method not in ("kmedoids", "greedy"):
            raise ValueError(f"method must be 'kmedoids' or 'greedy', got {self.method!r}")
        for name in ("stride", "window_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("margin", "busy_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0.0 <= self.copy_cost < float("inf"):
            raise ValueError(f"copy_cost must be at least 0, got {self.copy_cost}")


class UnitRoutes:
    """The experts that the next token of each sequence is expected to want: what the path predictor says of the token, where
    there is one, else what the sequence's last tokens used."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        top_k: int,
        *,
        residents: Callable[[], NDArray[np.bool_]],
        predictor: PathPredictor | None = None,
    ):
        """`residents`: gives bool [L, E] of what is resident now."""
        self._last = LastPaths(num_layers, num_experts, residents=residents)
        self._predictor, self._top_k = predictor, top_k
        self._predicted: dict[str, Paths] = {}

    @property
    def source(self) -> str:
        """What is asked: "path" or "last tokens"."""
        return "last tokens" if self._predictor is None else "path"

    def prompts(self, prompts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
        """Sequences begin."""
        if self._predictor is not None and prompts:
            ids = torch.tensor([token for prompt in prompts for token in prompt])
            rows = [name for name, prompt in zip(names, prompts, strict=True) for _ in prompt]
            self._predictor.paths(ids, rows)

    def step_begins(self, token_ids: Sequence[int], names: Sequence[str]) -> None:
        """The tokens that these sequences compute next, one of each."""
        if self._predictor is None:
            return
        for name in names:
            self._predicted.pop(name, None)
        said = self._predictor.paths(torch.tensor(token_ids), names)
        if said is None or len(said) != len(names):
            # more sequences than the predictor keeps apart
            return
        chosen = torch.zeros(said.shape, dtype=torch.bool)
        chosen.scatter_(-1, said.topk(min(self._top_k, said.shape[-1]), dim=-1).indices, True)
        self._predicted |= zip(names, chosen.numpy(), strict=True)

    def saw(self, layer: int, names: Sequence[str], expert_index: Tensor) -> None:
        """As `LastPaths.saw`."""
        self._last.saw(layer, names, expert_index.numpy(force=True))

    def ended(self, names: Sequence[str]) -> None:
        """Sequences are over."""
        if self._predictor is None:
            return
        for name in names:
            self._predictor.forget(name)
            self._predicted.pop(name, None)

    def paths(self, request_ids: list[str]) -> Paths:
        """As `Routes.paths`."""
        if all(name in self._predicted for name in request_ids):
            return np.stack([self._predicted[name] for name in request_ids])
        return self._last.paths(request_ids)

    def taken(self, request_ids: list[str]) -> Paths:
        """As `Routes.taken`."""
        return self._last.taken(request_ids)

    def residents(self) -> NDArray[np.bool_]:
        """As `Routes.residents`."""
        return self._last.residents()


class UnitScheduler:
    """Decides about batches between steps; not about how they are formed, nor about the copies that it takes.

    What was chosen is dealt out again in order of arrival, with the experts that were really used; where that would have cost no
    more, batches stay as they are for a while.
    """

    def __init__(self, routes: UnitRoutes, size: int, options: UnitOptions, *, expert_bytes: Sequence[int]):
        """`size`: B; `expert_bytes`: [L], of one expert."""
        self._routes, self._size, self._options = routes, size, options
        self._expert_bytes = list(expert_bytes)
        self._judge = BatchJudge(
            margin=options.margin, window_steps=options.window_steps, busy_share=options.busy_share
        )

    @property
    def routes(self) -> UnitRoutes:
        return self._routes

    @property
    def is_on(self) -> bool:
        """Whether batches are to decode side by side; where it does not pay, one after the other is better for the cache."""
        return self._judge.is_on

    @property
    def stride(self) -> int:
        """As in the options."""
        return self._options.stride

    def stats(self) -> dict[str, Any]:
        """Whether batches exchange sequences and why, as plain values."""
        return {**self._judge.stats(), "routes": self._routes.source}

    def ran(self, names: list[str], numbers: Sequence[int]) -> None:
        """A batch has been computed beside others; `numbers`: its sequences in the order of the inputs."""
        residents = int(self._routes.residents().sum())
        self._judge.record(np.array(numbers), self._routes.taken(names), residents)

    def rested(self) -> None:
        """A batch has been computed while others wait for their turn."""
        if not self._judge.is_on:
            self._judge.rest()

    def deal(self, batches: Sequence[Sequence[str]], moved: Callable[[Groups], int]) -> Groups | None:
        """New batches, as indices into the names of `batches` one after another; None: leave them as they are.

        Args:
            moved: bytes of keys and values that it would take to form these batches.
        """
        names = [name for batch in batches for name in batch]
        plain = arrival(len(names), self._size)
        if len(plain) < len(batches):
            # fewer batches are fewer unions, whatever the routes
            now, must = plain, True
        else:
            ends = np.cumsum([len(batch) for batch in batches])
            now, must = [np.arange(end - len(batch), end) for batch, end in zip(batches, ends, strict=True)], False
        better = self._better(names, now, moved) if len(plain) > 1 else None
        if better is not None:
            return better
        return now if must else None

    def order(self, batches: Sequence[Sequence[str]]) -> list[int]:
        """In which order to compute the batches of a unit: those first that miss the fewest bytes, before they are evicted."""
        residents = self._routes.residents()
        paths = [self._routes.paths(list(batch)) for batch in batches]
        missing = [self._cost([np.arange(len(each))], each, residents) for each in paths]
        return sorted(range(len(batches)), key=missing.__getitem__)

    def _better(self, names: list[str], now: Groups, moved: Callable[[Groups], int]) -> Groups | None:
        paths = self._routes.paths(names)
        if not paths.any():
            return None
        residents = self._routes.residents()
        form = kmedoids if self._options.method == "kmedoids" else greedy
        found = form(paths, self._size, residents=residents, expert_bytes=self._expert_bytes)
        before, after = self._cost(now, paths, residents), self._cost(found, paths, residents)
        extra = max(moved(found) - moved(now), 0) * self._options.copy_cost
        return found if after + extra < before * (1.0 - self._options.margin) else None

    def _cost(self, groups: Groups, paths: Paths, residents: NDArray[np.bool_]) -> int:
        return cost(groups, paths, residents=residents, expert_bytes=self._expert_bytes)

"""LoRA on experts: a low-rank product beside each expert's matrices is trained at its owner, and nothing else of it.

The pool's parameters are the effective weights W + s B A, so copies, transports and kernels know nothing of adapters, and
the backward pass leaves dL/dW in the pool's gradients. From that the owner makes dB = s dW A^T and dA = s B^T dW, which is
exact, updates A and B, and renews the effective weights from W, which it keeps beside: subtracting s B A again would drift.
An owner thus holds two weights and a gradient an expert, and optimizer state for the adapters alone. Sending adapters in
place of effective weights would save bytes on the links, at the price of kernels that know of them.

N kept experts, P elements of an expert, Q elements of its adapters, R rank, s = alpha / R. Source: LoRA (arXiv 2106.09685).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.config import OptimizerConfig
from raymoe.config.lora import LoraConfig
from raymoe.models import ExpertField, ExpertLayout, MoELayer
from raymoe.placement import Base
from raymoe.training.adamw import AdamWRows, square_sum
from raymoe.training.fssdp import SparseExperts
from raymoe.training.world import World

ReadAdapters = Callable[[int, int, Tensor], None]
"""(layer, expert, row [Q]): fills the row with that expert's adapters."""
_RUN_BYTES = 64 << 20
"""Of experts whose effective weights are made in one call."""


@dataclass(frozen=True)
class ExpertAdapters:
    """Where the adapters of one expert lie in a row of Q elements, and what they do to its weights."""

    expert: ExpertLayout
    matrices: tuple[ExpertField, ...]
    """Fields of the expert that have adapters."""
    layout: ExpertLayout
    """`gate_up_proj.A` [R, in] and `gate_up_proj.B` [out, R], and so on."""
    is_transposed: bool
    """The expert's matrices are [in, out]."""
    scaling: float

    @classmethod
    def of(cls, layer: MoELayer, lora: LoraConfig) -> "ExpertAdapters":
        """Adapters for all matrices of a layer's experts, or for none where `lora.experts` is false."""
        is_transposed = layer.spec.is_transposed
        matrices = tuple(field for field in layer.layout.fields if len(field.shape) == 2) if lora.experts else ()
        shapes: dict[str, tuple[int, ...]] = {}
        for field in matrices:
            rows, columns = reversed(field.shape) if is_transposed else field.shape
            shapes |= {f"{field.name}.A": (lora.rank, columns), f"{field.name}.B": (rows, lora.rank)}
        layout = ExpertLayout.of_shapes(shapes)
        return cls(layer.layout, matrices, layout, is_transposed, lora.scaling)

    def start(self, row: Tensor, seed: int, layer: int, expert: int) -> None:
        """Fills a row [Q] as training starts: A uniform within 1 / sqrt(in), as peft does, and B zero."""
        state = np.random.SeedSequence([seed % 2**64, layer, expert]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        row.zero_()
        for name, view in self.layout.views(row[None]).items():
            if name.endswith(".A"):
                bound = 1 / math.sqrt(view.shape[-1])
                view[0].copy_(torch.empty(view[0].shape).uniform_(-bound, bound, generator=generator))

    def apply(self, base: Tensor, rows: Tensor, out: Tensor) -> None:
        """Writes base + s B A, computed in the adapters' dtype. base, out: [n, P], rows: [n, Q]."""
        out.copy_(base)
        factors, before, after = self.layout.views(rows), self.expert.views(base), self.expert.views(out)
        for field in self.matrices:
            a, b = factors[f"{field.name}.A"], factors[f"{field.name}.B"]
            left, right = (a.mT, b.mT) if self.is_transposed else (b, a)
            weight = before[field.name].to(rows.dtype)
            after[field.name].copy_(torch.baddbmm(weight, left, right, alpha=self.scaling))

    def project(self, gradients: Tensor, rows: Tensor, out: Tensor) -> None:
        """Writes the adapters' gradients [n, Q] that follow from those of effective weights [n, P]. rows: [n, Q]."""
        factors, results, given = self.layout.views(rows), self.layout.views(out), self.expert.views(gradients)
        for field in self.matrices:
            gradient = given[field.name].to(rows.dtype)
            gradient = gradient.mT if self.is_transposed else gradient
            a, b = factors[f"{field.name}.A"], factors[f"{field.name}.B"]
            results[f"{field.name}.A"].copy_((b.mT @ gradient).mul_(self.scaling))
            results[f"{field.name}.B"].copy_((gradient @ a.mT).mul_(self.scaling))


class LoraRows(AdamWRows):
    """AdamW on adapters [N, Q], in float32 at the least, which keeps effective weights [N, P] in step with them.

    Where experts have no adapters they are frozen: nothing is kept beside the weights and nothing is updated.
    """

    def __init__(self, effective: Tensor, adapters: ExpertAdapters, config: OptimizerConfig):
        self.adapters = adapters
        self._effective = effective
        self._is_frozen = not adapters.matrices
        self.base = effective if self._is_frozen else effective.clone()
        """[N, P]: the weights as they came, which no step changes."""
        dtype = torch.promote_types(effective.dtype, torch.float32)
        super().__init__(effective.new_zeros(len(effective), adapters.layout.numel, dtype=dtype), config)
        self.gradients = torch.zeros_like(self.parameters)
        """[N, Q], of the adapters."""

    def tensors(self) -> dict[str, Tensor]:
        if self._is_frozen:
            return {"base": self.base}
        return {"base": self.base, "adapter": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def optimizer_bytes(self) -> int:
        """All that is kept beside effective weights and their gradients."""
        if self._is_frozen:
            return 0
        return sum(tensor.nbytes for tensor in self.tensors().values()) + self.gradients.nbytes

    def refresh(self, rows: Iterable[int]) -> None:
        """Makes effective weights of base weights and adapters that were written from outside."""
        if not self._is_frozen:
            for run in self._runs(rows):
                self.adapters.apply(self.base[run], self.parameters[run], self._effective[run])

    def rebind(self, parameters: Tensor) -> None:
        """Takes other memory for the effective weights; see `AdamWRows.rebind`."""
        more = len(parameters) - len(self.base)
        self._effective = parameters
        if self._is_frozen:
            self.base = parameters
        elif more:
            self.base = torch.cat([self.base, parameters[-more:]])
        if more:
            grown = self.parameters.new_zeros(more, self.parameters.shape[1])
            super().rebind(torch.cat([self.parameters, grown]))
            self.gradients = torch.cat([self.gradients, grown])

    def project(self, gradients: Tensor, rows: Iterable[int]) -> None:
        """Makes the adapters' gradients of those of effective weights, [N or more, P]."""
        for run in self._runs(rows):
            self.adapters.project(gradients[run], self.parameters[run], self.gradients[run])

    @torch.no_grad()
    def step(self, gradients: Tensor, rows: Iterable[int], number: int, lr: float, scale: Tensor | None) -> None:
        """Updates some rows of the adapters, and the effective weights with them; `gradients` [N, Q] are the adapters'."""
        if not self._is_frozen:
            rows = list(rows)
            super().step(gradients, rows, number, lr, scale)
            self.refresh(rows)

    def _runs(self, rows: Iterable[int]) -> Iterator[slice]:
        """Neighbouring rows together, as many as keep what is computed on the way small."""
        most = max(1, _RUN_BYTES // (self.base.shape[1] * self.parameters.itemsize))
        # neighbours differ from their place in order by the same number
        for _, run in groupby(enumerate(sorted(rows)), lambda pair: pair[1] - pair[0]):
            start, *others = (row for _, row in run)
            stop = start + 1 + len(others)
            yield from (slice(first, min(first + most, stop)) for first in range(start, stop, most))


class LoraSparseExperts(SparseExperts):
    """`SparseExperts` whose experts stay as they are, but for adapters that are trained.

    Args:
        seed: adapters start from it, each expert's equal on whatever rank it lives.
        read: gives the adapters to start from instead.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: Base,
        world: World,
        config: OptimizerConfig,
        *,
        lora: LoraConfig,
        seed: int,
        read: ReadAdapters | None = None,
    ):
        super().__init__(model, base, world, config)
        self._lora, self._seed, self._read = lora, seed, read

    def load_optimizer(self) -> None:
        """Makes adapters for the experts that the pool holds, once they have been read."""
        adapters = ExpertAdapters.of(self.layers[0].layer, self._lora)
        self.optimizer = self.trained = LoraRows(self.pool.kept, adapters, self._config)
        for (layer, expert), slot in self.pool.slots.items():
            if self._read is None or not adapters.matrices:
                adapters.start(self.trained.parameters[slot], self._seed, layer, expert)
            else:
                self._read(layer, expert, self.trained.parameters[slot])
        self.trained.refresh(self.pool.slots.values())

    def share_gradients(self) -> None:
        """Also makes the adapters' gradients, now that those of the weights are whole."""
        super().share_gradients()
        self.trained.project(self.pool.gradients, self.pool.slots.values())

    def square_sum(self) -> Tensor:
        """Of the gradients of the adapters that this rank owns, float64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if self.trained.adapters.matrices:
            for (layer, expert), slot in self.pool.slots.items():
                if self.base.owners[layer, expert] == self.world.rank:
                    total += square_sum(self.trained.gradients[slot])
        return total

    def update(self, number: int, lr: float, scale: Tensor | None) -> None:
        """One update of the adapters; see `AdamWRows.step`."""
        self.trained.step(self.trained.gradients, self.pool.slots.values(), number, lr, scale)

"""AdamW on runs of memory, with fp32 masters where parameters are narrower.

Source: Loshchilov and Hutter (arXiv 1711.05101); masters as in mixed-precision training (arXiv 1710.03740). torch's own fused
update does the arithmetic, so a step equals `torch.optim.AdamW(fused=True)` bit for bit where no master is kept.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from raymoe.config import OptimizerConfig

_WIDE = (torch.float32, torch.float64)


class AdamWRows:
    """Optimizer state beside parameters [R, C]: master (where needed) and two moments, row by row.

    Rows are updated one after another: what a row needs stays in the cache, and the temporary fp32 gradient is one row.
    """

    def __init__(self, parameters: Tensor, config: OptimizerConfig):
        self._config = config
        self.parameters = parameters
        self.has_master = parameters.dtype not in _WIDE
        self.master = parameters.float() if self.has_master else parameters
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, [R, C] each: all that says where training stands (a master stands for its parameter)."""
        name = "master" if self.has_master else "parameter"
        return {name: self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def optimizer_bytes(self) -> int:
        """Master and moments."""
        return self.exp_avg.nbytes + self.exp_avg_sq.nbytes + self.has_master * self.master.nbytes

    def refresh(self, rows: Iterable[int]) -> None:
        """Makes parameters of masters that were written from outside."""
        if self.has_master:
            for row in rows:
                self.parameters[row] = self.master[row]

    def rebind(self, parameters: Tensor) -> None:
        """Takes other memory for the parameters, which hold the same values; new rows at the end get new state."""
        assert len(parameters) >= len(self.master), "rows are never taken away"
        more = len(parameters) - len(self.master)
        self.parameters = parameters
        if not self.has_master:
            self.master = parameters
        elif more:
            self.master = torch.cat([self.master, parameters[-more:].float()])
        if more:
            grown = self.exp_avg.new_zeros(more, parameters.shape[1])
            self.exp_avg, self.exp_avg_sq = (torch.cat([each, grown]) for each in (self.exp_avg, self.exp_avg_sq))

    @torch.no_grad()
    def step(self, gradients: Tensor, rows: Iterable[int], number: int, lr: float, scale: Tensor | None) -> None:
        """Updates some rows.

        Args:
            gradients: [R, C] in the parameters' dtype; those of the rows are scaled in place.
            number: of the step, from 0.
            scale: scalar that gradients are multiplied by first, or None.
        """
        config = self._config
        steps = torch.tensor(float(number), device=self.master.device)
        for row in rows:
            gradient = gradients[row]
            if self.has_master:
                gradient = gradient.float()
            if scale is not None:
                gradient.mul_(scale)
            adamw(
                [self.master[row]],
                [gradient],
                [self.exp_avg[row]],
                [self.exp_avg_sq[row]],
                [],
                # torch counts it up
                [steps.clone()],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=config.betas[0],
                beta2=config.betas[1],
                lr=lr,
                weight_decay=config.weight_decay,
                eps=config.eps,
            )
            if self.has_master:
                self.parameters[row] = self.master[row]


def square_sum(x: Tensor) -> Tensor:
    """Sum of squares as a float64 scalar. Dot products of short pieces: as fast as memory, and few terms at a time add up in
    float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pieces = (piece.to(wide) for piece in x.flatten().split(1 << 16))
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).double().sum()

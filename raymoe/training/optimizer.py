"""Optimizer shards of one rank: replicated dense parameters and the experts it owns, gradients in place.

Dense gradients lie in one flat buffer a dtype, so that one all-reduce sums them without packing.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raymoe.config import OptimizerConfig
from raymoe.training.shard import ExpertShard
from raymoe.training.world import World


class ShardedAdamW:
    """AdamW over (dense parameters, owned experts) of one rank; equals AdamW over the whole model in one process."""

    def __init__(
        self, dense: list[nn.Parameter], shards: list[ExpertShard], config: OptimizerConfig, steps: int, world: World
    ):
        self._config, self._total_steps, self._world = config, steps, world
        self._dense = dense
        self._shards = [shard for shard in shards if shard.owned]
        self._flat = {dtype: self._bind(dtype) for dtype in dict.fromkeys(p.dtype for p in dense)}
        self._adamw = torch.optim.AdamW(
            [*dense, *(shard.parameter for shard in self._shards)],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def zero_gradients(self) -> None:
        """Of the dense parameters; the experts' are cleared when a step begins."""
        for flat in self._flat.values():
            flat.zero_()

    def reduce_dense_gradients(self) -> None:
        """Sums the dense gradients over all ranks."""
        for flat in self._flat.values():
            self._world.moved_bytes["dense_all_reduce"] += flat.nbytes
            dist.all_reduce(flat, group=self._world.dense)

    def clip(self) -> Tensor:
        """Scales all gradients down to the global norm `clip_norm`, each expert counted once.

        Returns:
            The norm before clipping, the same on every rank.
        """
        owned = [shard.owned_gradient for shard in self._shards]
        none = torch.zeros((), dtype=torch.float64, device=self._world.device)
        square = sum(map(_square_sum, owned), none)
        dist.all_reduce(square, group=self._world.dense)
        dense = list(self._flat.values())
        norm = sum(map(_square_sum, dense), square).sqrt()
        if self._config.clip_norm is not None:
            # the 1e-6 is torch.nn.utils.clip_grad_norm_'s
            scale = (self._config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for grad in [*owned, *dense]:
                grad.mul_(scale.to(grad.dtype))
        return norm

    def step(self, number: int) -> float:
        """Updates this rank's parameters with the learning rate of step `number` (from 0), which it returns."""
        lr = learning_rate(self._config, number, self._total_steps)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        return lr

    def state_bytes(self) -> int:
        """Parameters, gradients and moments that this rank holds."""
        state = [value for entry in self._adamw.state.values() for value in entry.values() if isinstance(value, Tensor)]
        pools = [tensor for shard in self._shards for tensor in (shard.pool, shard.gradient)]
        return sum(tensor.nbytes for tensor in [*self._dense, *self._flat.values(), *pools, *state])

    def _bind(self, dtype: torch.dtype) -> Tensor:
        parameters = [p for p in self._dense if p.dtype == dtype]
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=self._world.device)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)
        return flat


def _square_sum(x: Tensor) -> Tensor:
    """Sum of squares as float64. Dot products of short pieces: as fast as memory, and fp32 adds up few terms at a time."""
    return torch.stack([torch.dot(piece, piece) for piece in x.flatten().split(1 << 16)]).double().sum()


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine from `lr` to `lr * final_lr_ratio` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    ratio = config.final_lr_ratio + (1 - config.final_lr_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.lr * ratio

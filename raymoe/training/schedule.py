"""The learning rate of a step."""

import math

from raymoe.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then `schedule` from `lr` to `lr * final_lr_ratio` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.schedule]
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)

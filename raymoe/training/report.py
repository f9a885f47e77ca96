"""What a rank tells of a step."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepReport:
    """One rank's account of one step. Losses and loads are of the global batch."""

    step: int
    loss: float
    """Cross entropy, nats a token that counts."""
    balance_loss: float
    z_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    """Of all ranks."""
    step_s: float
    loads: np.ndarray
    """int64 [L, E], rows of this rank's own tokens."""
    computed_rows: np.ndarray
    """int64 [L], rows this rank computed."""
    copies: int
    """Expert copies that were made over all layers and ranks."""
    resharded: int
    """Experts that changed homes before the step, over all ranks."""
    moved_bytes: dict[str, int]
    """Bytes this rank sent in this step, by kind of collective."""
    link_bytes: dict[str, int]
    """The same by link, `near` within the node and `far`."""
    planning_ns: int
    """Planning and bookkeeping."""
    exposed_ns: int
    """Waiting for expert parameters and gradients."""
    attention_ns: int
    """From a block's start to its experts: the median over layers; 0 if the step was not timed."""
    experts_ns: int
    """Forward computation of `computed_rows` in all layers. On CUDA it says something only in steps that were timed."""
    experts_backward_ns: int
    """The same of the backward pass, recomputation apart."""
    snapshot_s: float = 0.0
    """How long this rank stood still for a snapshot after the step; 0 if none was taken."""
    snapshot_sent_bytes: int = 0
    """Of the snapshot before, to the buddy."""

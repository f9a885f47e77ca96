"""How many threads a step on a CPU computes with: sharing out a small product takes longer than the product."""

import torch

FEW_ROWS = 64
"""Tokens up to which a step's products are hardly more than reading their matrices."""
SMALL_BYTES = 1 << 20
"""Experts up to this size are computed on one thread then; measured with 0.39 MB on an AMD EPYC (Zen 4)."""


class StepThreads:
    """One thread for steps of few tokens over small experts, all that torch may use for others.

    torch's setting is the process's, so it is changed from a step's beginning to its end only.
    """

    def __init__(self, expert_bytes: int, device: str):
        """`expert_bytes`: of the largest expert."""
        self._is_small = device == "cpu" and expert_bytes <= SMALL_BYTES
        self._before: int | None = None

    def begin(self, num_rows: int) -> None:
        """Before a step of `num_rows` tokens, on its thread."""
        allowed = torch.get_num_threads()
        if self._is_small and num_rows <= FEW_ROWS and allowed > 1:
            self._before = allowed
            torch.set_num_threads(1)

    def end(self) -> None:
        """After it, on its thread, also if it failed."""
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None

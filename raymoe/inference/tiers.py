"""Where experts come from when they are not in the cache: the tiers below it, nearest first."""

from typing import Protocol

from torch import Tensor

from raymoe.models import ExpertFiles


class ExpertSource(Protocol):
    """A tier that holds every expert of the model. Called from several threads at once."""

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """Fills the flat `out` [numel of that layer's experts] with one expert, cast to its dtype.

        Returns:
            Bytes that the tier delivered.
        """
        ...


class CheckpointTier:
    """The checkpoint's own files: the last tier, always there."""

    def __init__(self, files: ExpertFiles):
        self._files = files

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        return self._files.read(layer, expert, out)

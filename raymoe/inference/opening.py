"""A model as engines and expert hosts open it: dense weights in memory, its experts in the files, in the precision asked for."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from raymoe.config.precision import Precision
from raymoe.inference.expert_form import ExpertForm
from raymoe.inference.lossy import lossy_line
from raymoe.inference.precision_file import EncodedTier, PrecisionTier, precision_path
from raymoe.inference.tiers import CheckpointTier, ExpertSource
from raymoe.models import ExpertFiles, MoELayer, load_without_experts


class OpenedModel(NamedTuple):
    model: PreTrainedModel
    files: ExpertFiles
    precision: Precision
    form: ExpertForm
    """Of experts in slots."""
    tiers: dict[str, ExpertSource]
    """Of files, nearest first, by the names that statistics use."""
    loss: dict[str, Any]
    """What the precision costs, as measured when its file was made; nothing if it is native."""

    @property
    def layers(self) -> list[MoELayer]:
        """The model's MoE layers."""
        return self.files.layers

    @property
    def warning(self) -> str | None:
        """Of a lossy precision: what it costs, in a line."""
        return lossy_line(str(self.precision), self.loss) if self.precision.is_lossy else None


def open_model(
    path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu", *, direct_io: bool, precision: str
) -> OpenedModel:
    """Opens a checkpoint.

    Args:
        dtype: of the dense weights and the computation.
        direct_io: read past the page cache.
        precision: of experts, see `Precision.parse`.

    Raises:
        ValueError: an incomplete checkpoint, an unknown precision, or one whose file is not there or not this checkpoint's.
    """
    wanted = Precision.parse(precision)
    model, files = load_without_experts(path, dtype, device, direct_io=direct_io)
    form = ExpertForm(files.layers, wanted, dtype)
    if not wanted.is_lossy:
        return OpenedModel(model, files, wanted, form, {"file": CheckpointTier(files)}, {})
    held = PrecisionTier(precision_path(path, wanted), files, wanted, direct_io=direct_io)
    # the checkpoint itself answers where that file fails
    tiers: dict[str, ExpertSource] = {wanted.kind: held, "file": EncodedTier(files, wanted)}
    return OpenedModel(model, files, wanted, form, tiers, held.loss)

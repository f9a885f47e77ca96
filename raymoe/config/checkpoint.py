"""Where training checkpoints go, how often, and where a run starts."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from raymoe.config.base import Strict


class CheckpointConfig(Strict):
    folder: Path | None = None
    """Directory that all workers see, for the checkpoints of this run alone; without it none are written."""
    every_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints; one more follows the last step."""
    keep: int = Field(default=3, ge=1)
    """So many of the newest stay."""
    resume: Literal["latest", "never"] | Path = "latest"
    """`latest`: the newest complete checkpoint in the folder, if there is one; `never`: a folder with checkpoints is refused;
    or the path of a checkpoint."""

    @model_validator(mode="after")
    def _has_a_folder(self) -> "CheckpointConfig":
        if self.folder is None and self.resume == "never":
            raise ValueError("resume: never says that folder must be empty, but no folder is given")
        return self

"""How many workers a training run has, and what keeps it going when some of them go."""

from typing import Any, Literal

from pydantic import Field, model_validator

from raymoe.config.base import Strict


class WorkersConfig(Strict):
    """`ExpertWorker` actors, one a device. A plain number means exactly so many."""

    min: int = Field(default=1, ge=1)
    """Below so many the run waits until more can be placed."""
    max: int = Field(default=2, ge=1)
    """More join the running training, up to so many, when the cluster has room."""
    wait_s: float | None = Field(default=None, gt=0)
    """How long the run waits below `min` before it ends. Default: as long as it takes."""

    @model_validator(mode="before")
    @classmethod
    def _plain_number(cls, value: Any) -> Any:
        if isinstance(value, dict | WorkersConfig):
            return value
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"give a number of workers from 1 on, or bounds: {{min: 1, max: 8}} (got {value!r})")
        return {"min": value, "max": value}

    @model_validator(mode="after")
    def _in_order(self) -> "WorkersConfig":
        if self.min > self.max:
            raise ValueError(f"min: {self.min} is above max, {self.max}")
        return self


class SnapshotConfig(Strict):
    """Snapshots in the memory of workers, from which the others go on when one is lost."""

    every: Literal["auto"] | int = "auto"
    """Steps between two; 0: none. `auto`: as often as `share` allows, found when the first ones were taken."""
    share: float = Field(default=0.01, gt=0, lt=1)
    """Of the training time, that snapshots may take."""

    @model_validator(mode="after")
    def _not_negative(self) -> "SnapshotConfig":
        if self.every != "auto" and self.every < 0:
            raise ValueError(f"every: must be 'auto' or an integer of at least 0, got {self.every}")
        return self

"""The actors that hold experts for the engines of a served model."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from raymoe.config.base import Strict
from raymoe.config.memory import parse_memory


class ExpertHostsConfig(Strict):
    """`ExpertHost` actors, spread over the cluster's nodes. A plain number means so many."""

    count: int = Field(ge=1)
    """One that dies is replaced, as soon as the cluster has room."""
    memory: str | int | None = None
    """What each holds: a share of all the model's experts ("40%") or bytes ("8GiB"). Default: an even share, so that together
    they hold each expert once; with more, the hottest are held several times."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that each reserves; it computes with as many threads."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs that each reserves; above 0 the experts are in GPU memory, and engines on the node cannot map them."""
    timeout_s: float = Field(default=5.0, gt=0)
    """A host that has not answered an engine for so long is passed over for a while."""

    @model_validator(mode="before")
    @classmethod
    def _plain_number(cls, value: Any) -> Any:
        if isinstance(value, dict | ExpertHostsConfig):
            return value
        # the command line of `serve run` gives strings
        if isinstance(value, bool) or not str(value).isdigit() or int(value) < 1:
            raise ValueError(f"give a number of hosts from 1 on, or {{count: 3, memory: 40%}} (got {value!r})")
        return {"count": int(value)}

    @field_validator("memory")
    @classmethod
    def _parses(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            parse_memory(value, total_bytes=1)
        return value

    @property
    def memory_each(self) -> str | int:
        """`memory`, or what stands for it."""
        # rounded up: what is cut off would be a last expert that nobody holds
        return self.memory if self.memory is not None else f"{min(100.0, 100 / self.count + 0.01):.2f}%"

"""Where a training run is logged."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

BUILT_IN_LOGS = {"jsonl": "path", "tensorboard": "folder"}
"""The loggers that raymoe has itself, and the one option that each takes."""


class LogConfig(BaseModel):
    """One logger: its name alone, or its name and what it is to be told, as `{name: wandb, project: x}`.

    Options are the logger's own: those that raymoe has itself are checked here, other packages check theirs.
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str = Field(min_length=1)
    """`jsonl` (option `path`), `tensorboard` (option `folder`), or one that an installed package offers under the entry point
    group `raymoe.loggers`."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known_options(self) -> "LogConfig":
        option = BUILT_IN_LOGS.get(self.name)
        for key, value in self.options.items() if option is not None else ():
            if key != option:
                raise ValueError(f"unknown key '{key}'; {self.name} takes '{option}' alone")
            if not isinstance(value, str) or not value:
                raise ValueError(f"{option} must be a path, got {value!r}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What stands beside the name."""
        return dict(self.model_extra or {})

"""What all configuration classes share."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration a user can mend: each line of the message names a key and says what would be right."""


class Strict(BaseModel):
    """Frozen, and refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

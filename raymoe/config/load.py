"""From YAML and `key=value` overrides to a checked configuration, or a message that names the key."""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raymoe.config.base import ConfigError, Strict

ConfigT = TypeVar("ConfigT", bound=Strict)


def load_config(cls: type[ConfigT], path: Path | str, overrides: list[str] | None = None) -> ConfigT:
    """Reads a YAML file, lays `key.sub=value` overrides over it (values are YAML), and validates it.

    Raises:
        ConfigError: missing file, bad YAML, bad override, or fields that do not validate; names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give the path of a YAML configuration")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, got {type(tree).__name__}")
    return parse_config(cls, tree, overrides, where=str(path))


def parse_config(
    cls: type[ConfigT], tree: dict[str, Any], overrides: list[str] | None = None, where: str = ""
) -> ConfigT:
    """Validates a tree of plain values, `key.sub=value` overrides laid over it. Raises: ConfigError, naming the key."""
    tree = _with_overrides(tree, overrides or [])
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        prefix = f"{where}: " if where else ""
        raise ConfigError("\n".join(prefix + _describe(cls, item) for item in error.errors())) from None


def _with_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    def copy(node: Any) -> Any:
        return {key: copy(value) for key, value in node.items()} if isinstance(node, dict) else node

    tree = copy(tree)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{item!r}: an override is written key=value, e.g. optimizer.lr=3e-4")
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            below = node.get(parent)
            if below is None:
                below = node[parent] = {}
            if not isinstance(below, dict):
                raise ConfigError(f"{key}: '{parent}' holds a single value, so nothing can be set below it")
            node = below
        try:
            node[last] = _yaml_value(text)
        except yaml.YAMLError:
            raise ConfigError(f"{key}: {text!r} is not a YAML value") from None
    return tree


def _yaml_value(text: str) -> Any:
    value = yaml.safe_load(text)
    # YAML 1.1 reads 3e-4 as a string: it wants 3.0e-4
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _describe(cls: type[BaseModel], item: Any) -> str:
    """One line for one validation error: dotted key, what is wrong, what would be right."""
    keys = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        known = _fields_at(cls, keys[:-1])
        close = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"{'.'.join(keys)}: unknown key; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{'.'.join(keys)}: missing; this key is required"
    got = "" if item["type"] == "value_error" or isinstance(item["input"], dict) else f" (got {item['input']!r})"
    return f"{'.'.join(keys) + ': ' if keys else ''}{message}{got}"


def _fields_at(cls: Any, keys: list[str]) -> list[str]:
    for key in keys:
        field = cls.model_fields.get(key) if hasattr(cls, "model_fields") else None
        cls = field.annotation if field is not None else None
    return list(cls.model_fields) if hasattr(cls, "model_fields") else []

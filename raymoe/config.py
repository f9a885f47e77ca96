"""The YAML models: what `raymoe train`, `raymoe serve` and a Serve deployment may be told.

One class a component; YAML keys are the field names; an unknown key, a wrong type or an impossible size is an error that
names the dotted key. A component takes its own part, never the whole.
"""

import difflib
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Dtype = Literal["float32", "bfloat16", "float64"]
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ConfigError(ValueError):
    """A configuration a user can mend: each line of the message names a key and says what would be right."""


class Strict(BaseModel):
    """Frozen, and refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Strict):
    path: Path | None = None
    """A Hugging Face directory to start from. Exactly one of `path` and `config`."""
    config: dict[str, Any] | None = None
    """A transformers configuration (`model_type` and its keys) to start from random weights. `vocab_size` and the special
    token ids come from the tokenizer."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the parameters, the moments and the computation."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.config is None):
            raise ValueError(
                "give exactly one of 'path' (a Hugging Face directory) and 'config' (a transformers configuration)"
            )
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs 'model_type', e.g. olmoe")
        if self.path is not None and not (self.path / "config.json").is_file():
            raise ValueError(f"path: no config.json in {self.path}; give a Hugging Face model directory")
        return self


class DataConfig(Strict):
    source: str = "stdlib"
    """`stdlib` (source and documentation of the Python standard library on this machine), or a text, JSONL or Parquet file,
    or a directory of them."""
    text_field: str = "text"
    """Field (JSONL) or column (Parquet) that holds the text."""
    held_out: float = Field(default=0.03, gt=0, lt=0.5)
    """Share of the text, by whole documents, kept for evaluation."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens a training sequence."""


class TokenizerConfig(Strict):
    path: Path | None = None
    """A directory with a saved tokenizer; without it a byte-level BPE is trained on the training text. With `model.path`
    the default is the model's own tokenizer."""
    vocab_size: int = Field(default=4096, ge=260)
    """Size of the vocabulary that is trained."""


class ExpertsConfig(Strict):
    policy: Literal["ep", "fssdp", "fssdp-paper"] = "fssdp"
    """`ep`: every expert only at its owner. `fssdp`: hot experts are materialised on other workers, step by step, where the
    measured costs say that it pays. `fssdp-paper`: as many as hide behind the attention, whether they pay or not."""
    overlap_degree: Literal["auto"] | int = "auto"
    """t: the most experts a layer may copy within one step. `auto`: what the policy finds from what was measured."""
    extra_slots: int | None = Field(default=None, ge=0)
    """m: copies a worker may hold per layer. Default: as many as it owns."""
    window: int = Field(default=5, ge=1)
    """Steps whose mean load is the forecast."""
    owners: list[list[int]] | None = None
    """Owner of expert e of MoE layer l, as [layer][expert]; default: an even split."""

    @field_validator("overlap_degree")
    @classmethod
    def _not_negative(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 0:
            raise ValueError("must be 'auto' or an integer of at least 0")
        return value


class OptimizerConfig(Strict):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with a linear warm-up and a cosine decay."""

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_steps: int = Field(default=20, ge=0)
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step, as a share of `lr`."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Global gradient norm, over all workers and with each expert counted once, above which gradients are scaled down."""


class TrainConfig(Strict):
    model: ModelConfig
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    experts: ExpertsConfig = ExpertsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    workers: int = Field(default=2, ge=1)
    """`ExpertWorker` actors, one a device."""
    worker_cpus: float = Field(default=1, gt=0)
    """CPUs a worker reserves; it computes with as many threads."""
    worker_gpus: float = Field(default=0, ge=0)
    """GPUs a worker reserves."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the workers, e.g. RAYMOE_KERNELS."""
    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=16, ge=1)
    """Sequences a step, over all workers together: the same whatever their number."""
    balance_loss: float | None = Field(default=None, ge=0)
    """Weight of the load-balance loss; default: the model configuration's `router_aux_loss_coef`."""
    seed: int = 0
    output: Path = Path("runs/train")
    """Where the checkpoint, the routing trace and the report go."""
    worker_timeout_s: float = Field(default=120, gt=0)
    """How long a collective or the placement of the workers may take before the run fails."""

    @model_validator(mode="after")
    def _enough_sequences(self) -> "TrainConfig":
        if self.batch < self.workers:
            raise ValueError(
                f"batch: {self.batch} sequences do not reach {self.workers} workers; need at least {self.workers}"
            )
        return self


class ServeConfig(Strict):
    model: Path
    """A Hugging Face directory of a MoE model, with its tokenizer."""
    name: str | None = None
    """What `/v1/models` calls it; default: the directory's name."""
    expert_memory: str | int = "50%"
    """Budget of the expert cache: a share of all experts ("50%") or bytes ("512MiB", 536870912)."""
    dtype: Dtype = "float32"
    engines: int = Field(default=1, ge=1)
    """`Engine` replicas."""
    max_batch_tokens: int = Field(default=512, ge=16)
    """Tokens a forward pass may hold, prompts included."""
    kv_tokens: int = Field(default=16384, ge=256)
    """Tokens the paged KV cache holds, over all requests."""
    max_tokens: int = Field(default=1024, ge=1)
    """Most tokens one answer may have."""
    max_prompt_tokens: int = Field(default=4096, ge=1)
    """Longest prompt that is taken."""
    max_ongoing_requests: int = Field(default=256, ge=1)
    """Requests a replica works on at once; further ones wait in the queue."""
    max_queued_requests: int = Field(default=512, ge=1)
    """Requests that may wait; further ones are answered 503."""
    num_cpus: float = Field(default=1, gt=0)
    """CPUs an `Engine` reserves; it computes with as many threads."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs an `Engine` reserves; above 0 the model and the expert cache are on the GPU."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the `Engine` processes, e.g. RAYMOE_KERNELS."""
    host: str = "127.0.0.1"
    """Address the HTTP proxy binds to (`raymoe serve`; with `serve run` and YAML it is Serve's own `http_options`)."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port of the HTTP proxy."""

    @field_validator("model")
    @classmethod
    def _is_a_model(cls, value: Path) -> Path:
        if not (value / "config.json").is_file():
            raise ValueError(
                f"no config.json in {value}; give a Hugging Face model directory, e.g. one that `raymoe train` wrote"
            )
        return value.resolve()

    @field_validator("expert_memory")
    @classmethod
    def _parses(cls, value: str | int) -> str | int:
        parse_memory(value, total_bytes=1)
        return value


def parse_memory(value: str | int, total_bytes: int) -> int:
    """Bytes that a budget stands for: "50%" of `total_bytes`, "512MiB", "1.5GB", or a number of bytes.

    Raises:
        ValueError: not such a budget, or not above 0, or above 100 %.
    """
    text = str(value).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMG]?i?B)?", text, flags=re.IGNORECASE)
    if not match or float(match[1]) <= 0 or (match[2] == "%" and float(match[1]) > 100):
        raise ValueError(
            f"{text!r} is not a memory budget; write a share such as '50%' (up to 100%) or bytes such as '512MiB'"
        )
    number, unit = float(match[1]), match[2]
    return int(total_bytes * number / 100) if unit == "%" else int(number * _UNITS[(unit or "B").upper()])


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

"""What `raymoe serve` and a Serve deployment may be told."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from raymoe.config.base import Strict
from raymoe.config.expert_hosts import ExpertHostsConfig
from raymoe.config.memory import parse_memory
from raymoe.config.precision import Precision

Dtype = Literal["float32", "bfloat16", "float64"]

KeyHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ServeConfig(Strict):
    model: Path
    """A Hugging Face directory of a MoE model, with its tokenizer."""
    name: str | None = None
    """What `/v1/models` calls it; default: the directory's name."""
    expert_memory: str | int = "50%"
    """Budget of the expert cache: a share of all experts ("50%") or bytes ("512MiB", 536870912)."""
    arena: bool = False
    """Engines on a node compute with one copy of all experts in its shared memory, in place of slots of their own. CPUs only."""
    dtype: Dtype = "float32"
    expert_precision: str = "native"
    """What experts are kept in: `native` (exact), or lossy, from a file that `raymoe experts MODEL` makes: `bf16`, `int8`, `int4`,
    or `int4:32`, with the size of a group that shares a scale (32, 64, 128)."""
    engines: int = Field(default=1, ge=1)
    """`Engine` replicas."""
    on_engine_death: Literal["continue", "fail"] = "continue"
    """Of an answer that had begun: another engine goes on with it, or it ends with an error. Others begin again in both cases."""
    max_batch_tokens: int = Field(default=512, ge=16)
    """Tokens a forward pass may hold, prompts included."""
    kv_tokens: int = Field(default=16384, ge=256)
    """Tokens the paged KV cache holds, over all requests."""
    prefix_sharing: bool = True
    """Prompts that begin alike share pages of the KV cache, and what they share is read once."""
    max_tokens: int = Field(default=1024, ge=1)
    """Most tokens one answer may have."""
    max_prompt_tokens: int = Field(default=4096, ge=1)
    """Longest prompt that is taken."""
    max_choices: int = Field(default=8, ge=1)
    """Most choices one request may ask for: `n` times its prompts. Each is a request of its own to the engines."""
    max_body_bytes: int = Field(default=8 << 20, ge=1)
    """Longest body of a request."""
    deadline_s: float = Field(default=600, gt=0)
    """Seconds after which a request is given up, waiting included; one may ask for less."""
    drain_s: float = Field(default=30, ge=0)
    """Seconds that what is taken down goes on with the answers it has begun."""
    api_keys: tuple[KeyHash, ...] = ()
    """SHA-256, in hexadecimal, of each key that clients may send as `Authorization: Bearer KEY`; none: nobody is asked for one."""
    admin_keys: tuple[KeyHash, ...] = ()
    """The same of keys that may change budgets too. Where there are keys but none of these, nobody may over HTTP."""
    max_batch_requests: int = Field(default=256, ge=1)
    """Requests a forward pass may hold; when more are active, those share one that want the same experts."""
    max_wait_steps: int = Field(default=16, ge=1)
    """Steps in a row that such a request may be left out."""
    expert_readers: int = Field(default=1, ge=0)
    """Threads that fetch experts while others compute; without any, nothing is fetched ahead."""
    eviction: Literal["expected_use", "lru", "global_lru", "lfu", "plec"] = "expected_use"
    """Which expert gives up its slot: the one expected to be wanted last, or an older rule, see docs/serving.md."""
    direct_io: bool = True
    """Read experts past the page cache, which would serve them from memory that no budget knows of."""
    predictors: tuple[Literal["look_ahead", "token_table", "transitions", "path"], ...] = (
        "look_ahead",
        "token_table",
        "path",
    )
    """What foretells the experts that layers will want; each rests by itself where it does not pay. `path` needs
    `raymoe predictor train`."""
    expert_hosts: ExpertHostsConfig | None = None
    """Actors that hold experts in memory, on this node and others: a number of them, or {count: 3, memory: 40%, ...}."""
    on_miss: Literal["wait", "send", "compressed"] = "wait"
    """`wait`: bring the expert. `send`: have a host that holds it compute the rows, where that is expected to be cheaper.
    `compressed`: of a model with compressed experts, let the trained vectors of a weaker expert act in its place; this changes
    answers."""
    max_ongoing_requests: int = Field(default=256, ge=1)
    """Requests a replica works on at once; further ones wait in the queue."""
    max_queued_requests: int = Field(default=512, ge=1)
    """Requests that may wait; further ones are answered 429."""
    num_cpus: float = Field(default=1, gt=0)
    """CPUs an `Engine` reserves; it computes with as many threads."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs an `Engine` reserves; above 0 the model and the expert cache are on the GPU."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the `Engine` processes, e.g. RAYMOE_KERNELS."""
    host: str = "127.0.0.1"
    """Address the HTTP proxy binds to. With `serve run` and YAML Serve binds by its own `http_options`, which leave the choice to
    it: all interfaces in YAML. What arrives at another address than this one and the loopback is refused; 0.0.0.0 takes all."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port of the HTTP proxy."""
    grpc_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the gRPC proxy, which listens at all addresses and answers as `host` says; none: there is no gRPC. With `serve run`
    and YAML it is Serve's own `grpc_options`."""

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

    @field_validator("expert_precision")
    @classmethod
    def _is_one(cls, value: str) -> str:
        return str(Precision.parse(value))

    @model_validator(mode="after")
    def _arena_is_alone(self) -> "ServeConfig":
        others = {"num_gpus": self.num_gpus > 0, "expert_hosts": self.expert_hosts is not None}
        others["expert_memory"] = "expert_memory" in self.model_fields_set
        if self.arena and (other := next((name for name, is_set in others.items() if is_set), None)):
            raise ValueError(f"arena: it holds all experts in the node's memory, for CPUs; leave {other} or arena out")
        return self

    @model_validator(mode="after")
    def _send_has_hosts(self) -> "ServeConfig":
        if self.on_miss == "send" and self.expert_hosts is None:
            raise ValueError("on_miss: 'send' needs hosts that hold experts; set expert_hosts, or on_miss: wait")
        return self

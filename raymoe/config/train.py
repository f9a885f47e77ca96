"""What `raymoe train` may be told."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raymoe.config.base import Strict
from raymoe.config.checkpoint import CheckpointConfig
from raymoe.config.data import DataConfig, TokenizerConfig
from raymoe.config.logs import LogConfig
from raymoe.config.lora import LoraConfig
from raymoe.config.workers import SnapshotConfig, WorkersConfig
from raymoe.placement import trainable_names


class ModelConfig(Strict):
    path: Path | None = None
    """A Hugging Face directory to start from. Exactly one of `path` and `config`."""
    config: dict[str, Any] | None = None
    """A transformers configuration (`model_type` and its keys) to start from random weights. `vocab_size` and the special
    token ids come from the tokenizer."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of parameters and computation. With bfloat16 the optimizer keeps float32 masters and moments."""

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


class ExpertsConfig(Strict):
    policy: str = "fssdp"
    """`ep`: every expert only at its owner. `fssdp`: hot experts are materialised on other workers, step by step, where the
    measured costs say that it pays, and rows go to their own worker's copy or to where there is least to do, whichever pays.
    `fssdp-paper`: as many as hide behind the attention, whether they pay or not. With `-rm` copies are given up after forward and
    gathered again in backward: less memory, more traffic. Rivals: `fastermoe`, `smartmoe`, `flexmoe`, `pro-prophet`, `eplb`,
    `lazarus`."""
    transport: Literal["auto", "p2p", "a2a", "hierarchical"] = "auto"
    """How copies travel. `p2p`: from the owner to each holder. `a2a`: one all-to-all. `hierarchical`: once to each node, and
    on from there. `auto`: hierarchical where workers are on several nodes."""
    dispatch: Literal["auto", "local", "node", "even", "capacity", "level"] = "auto"
    """How rows find a copy. `local`: their own worker's first. `level`: so that workers compute equally much. `auto`: as the
    policy finds. The others: see `raymoe.placement.dispatch`."""
    reshard_every: Literal["auto"] | int = "auto"
    """Steps between two re-shardings, when experts change homes with their optimizer state. `auto`: as often as the policy
    has it; 0: never."""
    cluster: Path | None = None
    """A cluster file to plan from (see `raymoe plan --measure`); without it links and computation are measured as the run
    starts. What is measured differs from run to run, and sums with it in their last bits; with a file they do not."""
    overlap_degree: Literal["auto"] | int = "auto"
    """t: the most experts a layer may copy within one step. `auto`: what the policy finds from what was measured."""
    extra_slots: int | None = Field(default=None, ge=0)
    """m: copies a worker may hold per layer. Default: as many as it owns."""
    window: int = Field(default=5, ge=1)
    """Steps whose mean load is the forecast."""
    owners: list[list[int]] | None = None
    """Owner of expert e of MoE layer l, as [layer][expert]; default: an even split."""

    @field_validator("policy")
    @classmethod
    def _can_train(cls, value: str) -> str:
        if value not in trainable_names():
            raise ValueError(f"there is no such policy to train with; choose one of {', '.join(trainable_names())}")
        return value

    @field_validator("overlap_degree", "reshard_every")
    @classmethod
    def _not_negative(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 0:
            raise ValueError("must be 'auto' or an integer of at least 0")
        return value


class OptimizerConfig(Strict):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with a linear warm-up and a decay."""

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From the end of the warm-up to the last step."""
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
    workers: WorkersConfig = WorkersConfig(min=2, max=2)
    """`ExpertWorker` actors, one a device: a number, or `{min: 1, max: 8}` to train on whatever there is."""
    worker_cpus: float = Field(default=1, gt=0)
    """CPUs a worker reserves; it computes with as many threads."""
    worker_gpus: float = Field(default=0, ge=0)
    """GPUs a worker reserves."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the workers, e.g. RAYMOE_KERNELS."""
    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=16, ge=1)
    """Sequences a step, over all workers together: the same whatever their number."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Sequences that a worker takes through the model at once; gradients are accumulated over as many passes as that takes.
    Default: all it has in one."""
    recompute: bool = False
    """Activation checkpointing: only what enters a block is kept, and the block's forward runs again in backward."""
    dense: Literal["replicated", "sharded"] = "replicated"
    """Parameters that are not experts: all of them on every worker, or sharded by FSDP2. Sharded ones take less
    memory and longer steps, and a change of workers rebuilds the model from its files and a snapshot."""
    balance_loss: float | None = Field(default=None, ge=0)
    """Weight of the load-balance loss; default: the model configuration's `router_aux_loss_coef`."""
    z_loss: float | None = Field(default=None, ge=0)
    """Weight of the routers' z-loss; default: the model configuration's `router_z_loss_coef`."""
    lora: LoraConfig | None = None
    """Train low-rank adapters, and nothing else."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints of the training state, to go on from."""
    logs: list[LogConfig] = Field(default_factory=lambda: [LogConfig(name="jsonl")])
    """Where the values of every step go: `jsonl` (`output/log.jsonl`), `tensorboard`, or a logger of another package. A name,
    or a name with options: `[jsonl, {name: wandb, project: x}]`."""
    profile_steps: int = Field(default=0, ge=0)
    """Steps that each worker traces with the torch profiler, into `output/profile`; they take longer. `--profile` sets it."""
    seed: int = 0
    output: Path = Path("runs/train")
    """Where the checkpoint, the routing trace and the report go."""
    worker_timeout_s: float = Field(default=120, gt=0)
    """How long a collective may take before it counts as broken, and the first placement of the workers before the run fails."""
    heartbeat_s: float = Field(default=10, gt=0)
    """A worker that has not answered for so long counts as dead."""
    snapshots: SnapshotConfig = SnapshotConfig()
    """Snapshots in memory, from which training goes on when a worker is lost."""
    detached: bool = False
    """Whether the run goes on when the process that started it is gone; `raymoe status` finds it."""

    @model_validator(mode="after")
    def _enough_sequences(self) -> "TrainConfig":
        most = self.workers.max
        if self.batch < most:
            raise ValueError(f"batch: {self.batch} sequences do not reach {most} workers; need at least {most}")
        return self

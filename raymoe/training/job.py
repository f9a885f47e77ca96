"""A training run as files: what every rank needs, written once by the driver, on storage that all workers see."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from raymoe.cluster_file import ClusterConfig
from raymoe.config import ConfigError, TrainConfig, load_config
from raymoe.models import CheckpointWriter, MoELayer, load_without_experts, moe_layers, router_losses
from raymoe.placement import Base, ClusterSpec, Workload, check_owners, even_owners, policy
from raymoe.training.batches import Batch, open_batches
from raymoe.training.checkpoint import resume_path
from raymoe.training.data.prepare import PreparedData, prepare_data
from raymoe.training.fssdp import SparseExperts
from raymoe.training.lora_start import start_lora
from raymoe.training.micros import num_micros
from raymoe.training.placing import first_base
from raymoe.training.publication import Publication
from raymoe.training.state import restore, saved_placement
from raymoe.training.trainer import Trainer, TrainerConfig
from raymoe.training.world import World

_FIRST_SNAPSHOTS = 4
"""Steps between two snapshots, until it is known what one costs."""

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainJob:
    """Everything a rank builds its trainer from. Small: the big things are paths."""

    config: TrainConfig
    folder: Path
    model_path: Path
    """The checkpoint that training starts from."""
    owners: np.ndarray | None
    """int64 [L, E], for the largest number of workers, if the configuration says so."""
    balance_weight: float
    z_weight: float
    num_experts: int
    num_layers: int
    workload: Workload
    """What a MoE layer moves and computes; its times are measured once the workers run."""
    expert_parameters: int
    """Parameters of all experts."""
    total_parameters: int
    resumes: Path | None
    """The training checkpoint that the run goes on from."""

    @property
    def overlap_degree(self) -> int | None:
        """The cap that the configuration sets."""
        degree = self.config.experts.overlap_degree
        return None if degree == "auto" else degree

    def extra_slots(self, size: int) -> int:
        """Copies a layer that one of `size` workers may hold: by default as many as it owns."""
        slots = self.config.experts.extra_slots
        return -(-self.num_experts // size) if slots is None else min(slots, self.num_experts)

    def owners_among(self, size: int) -> np.ndarray:
        """int64 [L, E]: owners at the start of a run of `size` workers."""
        if self.owners is not None and size == self.config.workers.max:
            return self.owners
        return even_owners(self.num_layers, self.num_experts, size)

    def first_publication(self, nodes: tuple[int, ...]) -> Publication:
        """What holds until times and links are measured: no copies, unless their number does not depend on them.

        Args:
            nodes: node of every worker.

        Raises:
            ConfigError: a cluster file that cannot be used, or that is of another number of devices.
        """
        experts = self.config.experts
        cluster = _cluster_of(experts.cluster, len(nodes)) if experts.cluster else ClusterSpec(nodes, 1, 1)
        transport = experts.transport
        if transport == "auto":
            transport = "hierarchical" if len(set(nodes)) > 1 else "p2p"
        every = self.config.snapshots.every
        return Publication(
            version=0,
            policy=experts.policy,
            cluster=cluster,
            workload=replace(self.workload, fan_out="hierarchical" if transport == "hierarchical" else "p2p"),
            extra_slots=0 if self.waits_for_costs else self.extra_slots(len(nodes)),
            overlap_degree=self.overlap_degree,
            window=experts.window,
            dispatch=None if experts.dispatch == "auto" else experts.dispatch,
            transport=transport,
            is_measured=experts.cluster is not None,
            snapshot_every=_FIRST_SNAPSHOTS if every == "auto" else every,
        )

    @property
    def waits_for_costs(self) -> bool:
        """Whether nothing is copied until costs are measured."""
        experts = self.config.experts
        return experts.cluster is None and policy(experts.policy).needs_costs(self.overlap_degree)

    def next_publication(self, last: Publication, nodes: tuple[int, ...]) -> Publication:
        """What the ranks of another epoch plan from: what was measured still holds."""
        first = self.first_publication(nodes) if self.config.experts.cluster is None else last
        slots = 0 if self.waits_for_costs and not last.is_measured else self.extra_slots(len(nodes))
        return replace(
            last,
            version=last.version + 1,
            cluster=replace(last.cluster, node_of=nodes),
            workload=replace(last.workload, fan_out=first.workload.fan_out),
            transport=first.transport,
            extra_slots=slots,
            is_stop=False,
        )

    def trainer_config(self, publication: Publication) -> TrainerConfig:
        """What a rank's step depends on."""
        config = self.config
        every = config.experts.reshard_every
        return TrainerConfig(
            optimizer=config.optimizer,
            steps=config.steps,
            publication=publication,
            balance_weight=self.balance_weight,
            z_weight=self.z_weight,
            micro_batch=config.micro_batch,
            recompute=config.recompute,
            dense=config.dense,
            reshard_every=None if every == "auto" else every,
            identity={
                "seed": config.seed,
                "batch": config.batch,
                "data.sequence_length": config.data.sequence_length,
                "lora.alpha": config.lora.alpha if config.lora else None,
                "lora.experts": config.lora.experts if config.lora else None,
            },
        )

    def batches(self) -> Callable[[int], Batch]:
        """The global batch of every step, as a rank reads it."""
        config = self.config
        return open_batches(
            self.folder, sequence_length=config.data.sequence_length, global_batch=config.batch, seed=config.seed
        ).batch

    def start_trainer(self, world: World, publication: Publication, resumes: Path | None) -> Trainer:
        """One rank's trainer, from files; it goes on where the checkpoint `resumes` ends, if that is given."""
        saved = saved_placement(resumes, world.size) if resumes else None
        base = None
        if saved is not None:
            publication, base = saved
        trainer = self._trainer(
            world, publication, base or first_base(publication, self.owners_among(world.size), world)
        )
        if resumes is not None:
            restore(trainer, resumes)
        return trainer

    def rehearsing_trainer(self, world: World, share: int) -> Trainer:
        """A trainer in a world of its own whose step takes memory and time like that of one of `share` ranks; what it learns
        is worth nothing."""
        owners = even_owners(self.num_layers, self.num_experts, share)
        # the others' belong to a rank that is not there: their rows are nobody's
        base = Base.of_owners(np.minimum(owners, 1), 2)
        batches, rows = self.batches(), -(-self.config.batch // share)
        alone = replace(self.first_publication((0, 0)), policy="ep")
        world = replace(world, nodes=(0, 0))
        return self._trainer(world, alone, base, lambda step: batches(step).rows(0, rows))

    def _trainer(
        self, world: World, publication: Publication, base: Base, batches: Callable[[int], Batch] | None = None
    ) -> Trainer:
        model, files = load_without_experts(self.model_path, DTYPES[self.config.model.dtype], world.device)
        lora = self.config.lora
        experts = start_lora(model, lora, self.config.seed) if lora else SparseExperts
        config = self.trainer_config(publication)
        return Trainer(model, files, world, config, batches or self.batches(), base, experts)


def prepare_text(config: TrainConfig, folder: Path) -> PreparedData:
    """Brings text and tokenizer to where ranks read them; see `prepare_data`."""
    return prepare_data(
        config.data, config.tokenizer, config.model.path, folder, seed=config.seed, global_batch=config.batch
    )


def prepare_job(config: TrainConfig, folder: Path, data: PreparedData) -> TrainJob:
    """Settles the model that training starts from (random weights are written to `folder/initial`) and the owners.

    Raises:
        ConfigError: a model configuration that transformers refuses, owners that do not fit it, or passes that some worker
            would have no sequence for.
        CheckpointError: a checkpoint to go on from that cannot be used.
    """
    path = config.model.path or _write_initial(config, folder / "initial", data.tokenizer)
    return TrainJob(**job_fields(config, folder, path))


def job_fields(config: TrainConfig, folder: Path, model_path: Path) -> dict[str, Any]:
    """The fields of a `TrainJob` that starts from a Hugging Face directory. Raises: as `prepare_job`."""
    model_config = AutoConfig.from_pretrained(model_path, local_files_only=True)
    if "compression" in (getattr(model_config, "raymoe", None) or {}):
        raise ConfigError(
            f"model.path: {model_path} has compressed experts, which raymoe train does not fit; use raymoe compress --train all, "
            "or train the model that it was made of"
        )
    layers, total_parameters = _shape_of(model_config)
    for size in range(config.workers.min, config.workers.max + 1):
        try:
            num_micros(config.batch, size, config.micro_batch)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    losses = router_losses(model_config)
    checkpoint = config.checkpoint
    return {
        "config": config,
        "folder": folder,
        "model_path": model_path,
        "owners": _owners(config, len(layers), layers[0].num_experts),
        "balance_weight": losses.balance if config.balance_loss is None else config.balance_loss,
        "z_weight": losses.z if config.z_loss is None else config.z_loss,
        "num_experts": layers[0].num_experts,
        "num_layers": len(layers),
        "workload": _workload(layers[0], model_config.get_text_config().hidden_size, config),
        "expert_parameters": sum(
            layer.num_experts * sum(field.numel for field in layer.layout.fields) for layer in layers
        ),
        "total_parameters": total_parameters,
        "resumes": resume_path(checkpoint.folder, checkpoint.resume) if checkpoint.folder else None,
    }


def _owners(config: TrainConfig, num_layers: int, num_experts: int) -> np.ndarray | None:
    if config.experts.owners is None:
        return None
    owners = np.array(config.experts.owners, dtype=np.int64)
    try:
        if owners.shape != (num_layers, num_experts):
            raise ValueError(
                f"got {list(owners.shape)}, the model has {num_layers} MoE layers of {num_experts} experts"
            )
        return check_owners(owners, config.workers.max)
    except ValueError as error:
        raise ConfigError(f"experts.owners: {error}") from None


def _cluster_of(path: Path, num_devices: int) -> ClusterSpec:
    cluster = load_config(ClusterConfig, path).spec
    if cluster.num_devices != num_devices:
        raise ConfigError(
            f"experts.cluster: {path} describes {cluster.num_devices} devices, the run has {num_devices} workers"
        )
    return cluster


def _workload(layer: MoELayer, hidden_size: int, config: TrainConfig) -> Workload:
    parameters = sum(field.numel for field in layer.layout.fields)
    size = DTYPES[config.model.dtype].itemsize
    # two moments, and a float32 master where parameters are narrower
    state_size = 12 if size < 4 else 2 * size
    if config.lora is not None:
        # the frozen base beside the effective weights; adapters are small
        state_size = size
    return Workload(
        expert_bytes=parameters * size,
        row_bytes=hidden_size * size,
        row_flops=2 * parameters,
        choices=layer.top_k,
        state_bytes=parameters * state_size,
    )


def _shape_of(model_config: PretrainedConfig) -> tuple[list[MoELayer], int]:
    """The MoE layers and the number of parameters of a model that is not in memory."""
    kind = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(model_config)
    return moe_layers(model), sum(parameter.numel() for parameter in model.parameters())


def _write_initial(config: TrainConfig, path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    keys = dict(config.model.config or {})
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        model_config: PretrainedConfig = AutoConfig.for_model(
            keys.pop("model_type"), **({"vocab_size": len(tokenizer)} | ids | keys)
        )
        set_seed(config.seed)
        model = AutoModelForCausalLM.from_config(model_config, dtype=DTYPES[config.model.dtype])
        if model.dtype == torch.float64:
            # grouped_mm, the default, knows no float64
            model.set_experts_implementation("eager")
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    except Exception as error:
        raise ConfigError(f"model.config: transformers cannot run it: {error}") from error
    moe_layers(model)
    with CheckpointWriter(path, model, tokenizer) as writer:
        writer.add(model.state_dict())
    return path

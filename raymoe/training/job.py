"""A training run as files: what every rank needs, written once by the driver, on storage that all workers see."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase, set_seed

from raymoe.config import ConfigError, TrainConfig
from raymoe.models import CheckpointWriter, MoELayer, load_without_experts, moe_layers
from raymoe.placement import ClusterSpec, Workload, check_owners, even_owners
from raymoe.training.batches import Batches, TokenStream, pack
from raymoe.training.publication import Publication
from raymoe.training.text import Document, read_documents, split_documents
from raymoe.training.tokenizer import load_tokenizer, train_tokenizer
from raymoe.training.trainer import Trainer, TrainerConfig
from raymoe.training.world import World

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainJob:
    """Everything a rank builds its trainer from. Small: the big things are paths."""

    config: TrainConfig
    folder: Path
    model_path: Path
    """The checkpoint that training starts from."""
    owners: np.ndarray
    """int64 [L, E]."""
    balance_weight: float
    num_experts: int
    num_layers: int
    workload: Workload
    """What a MoE layer moves and computes; its times are measured once the workers run."""
    expert_parameters: int
    """Parameters of all experts."""
    total_parameters: int
    train_tokens: int
    train_bytes: int

    @property
    def overlap_degree(self) -> int | None:
        """The cap that the configuration sets."""
        degree = self.config.experts.overlap_degree
        return None if degree == "auto" else degree

    @property
    def extra_slots(self) -> int:
        """Copies a layer that a worker may hold: by default as many as it owns."""
        slots = self.config.experts.extra_slots
        return -(-self.num_experts // self.config.workers) if slots is None else slots

    @property
    def first_publication(self) -> Publication:
        """What holds until times and links are measured: no copies, unless their number does not depend on them."""
        experts = self.config.experts
        waits = experts.policy == "fssdp" or self.overlap_degree is None
        return Publication(
            0,
            experts.policy,
            ClusterSpec.even(1, self.config.workers, intra_bytes_s=1),
            self.workload,
            0 if waits else self.extra_slots,
            self.overlap_degree,
            experts.window,
        )


@dataclass(frozen=True)
class PreparedText:
    """What the driver keeps of the text, to evaluate with."""

    tokenizer: PreTrainedTokenizerBase
    train: TokenStream
    held_out: TokenStream
    held_out_documents: list[Document]


def prepare_text(config: TrainConfig, folder: Path) -> PreparedText:
    """Reads and splits the text, trains or loads the tokenizer, packs both parts, and leaves the training tokens in
    `folder/tokens.npy`.

    Raises:
        ValueError: text that is missing, unreadable or too little; names the file, row and field.
    """
    data = config.data
    documents = read_documents(data.source, text_field=data.text_field)
    train_documents, held_out_documents = split_documents(documents, data.held_out, config.seed)
    tokenizer_path = config.tokenizer.path or config.model.path
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path)
    else:
        tokenizer = train_tokenizer((document.text for document in train_documents), config.tokenizer.vocab_size)
    train = pack(train_documents, tokenizer, data.sequence_length)
    held_out = pack(held_out_documents, tokenizer, min(data.sequence_length, 64))
    Batches(train, data.sequence_length, config.batch, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", train.tokens)
    return PreparedText(tokenizer, train, held_out, held_out_documents)


def prepare_job(config: TrainConfig, folder: Path, text: PreparedText) -> TrainJob:
    """Settles the model that training starts from (random weights are written to `folder/initial`) and the owners.

    Raises:
        ConfigError: a model configuration that transformers refuses, or owners that do not fit it.
    """
    path = config.model.path or _write_initial(config, folder / "initial", text.tokenizer)
    model_config = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    layers = moe_layers(model)
    num_layers, num_experts = len(layers), layers[0].num_experts
    if config.experts.owners is None:
        owners = even_owners(num_layers, num_experts, config.workers)
    else:
        owners = np.array(config.experts.owners, dtype=np.int64)
        try:
            if owners.shape != (num_layers, num_experts):
                raise ValueError(
                    f"got {list(owners.shape)}, the model has {num_layers} MoE layers of {num_experts} experts"
                )
            check_owners(owners, config.workers)
        except ValueError as error:
            raise ConfigError(f"experts.owners: {error}") from None
    balance = config.balance_loss
    if balance is None:
        balance = getattr(model_config.get_text_config(), "router_aux_loss_coef", None) or 0.0
    return TrainJob(
        config=config,
        folder=folder,
        model_path=path,
        owners=owners,
        balance_weight=balance,
        num_experts=num_experts,
        num_layers=num_layers,
        workload=_workload(layers[0], model_config.get_text_config().hidden_size, DTYPES[config.model.dtype]),
        expert_parameters=sum(
            layer.num_experts * sum(field.numel for field in layer.layout.fields) for layer in layers
        ),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_tokens=len(text.train.tokens),
        train_bytes=text.train.num_bytes,
    )


def _workload(layer: MoELayer, hidden_size: int, dtype: torch.dtype) -> Workload:
    parameters = sum(field.numel for field in layer.layout.fields)
    return Workload(
        expert_bytes=parameters * dtype.itemsize,
        row_bytes=hidden_size * dtype.itemsize,
        row_flops=2 * parameters,
        choices=layer.top_k,
        # two moments
        state_bytes=2 * parameters * dtype.itemsize,
    )


def build_trainer(job: TrainJob, world: World) -> Trainer:
    """One rank's trainer, from the job's files."""
    config = job.config
    model, files = load_without_experts(job.model_path, DTYPES[config.model.dtype], world.device)
    tokens = np.load(job.folder / "tokens.npy", mmap_mode="r")
    batches = Batches(TokenStream(tokens, job.train_bytes), config.data.sequence_length, config.batch, config.seed)
    trainer_config = TrainerConfig(config.optimizer, config.steps, job.balance_weight, job.first_publication)
    return Trainer(model, files, world, trainer_config, batches.batch, job.owners)


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
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    except Exception as error:
        raise ConfigError(f"model.config: transformers cannot run it: {error}") from error
    moe_layers(model)
    with CheckpointWriter(path, model, tokenizer) as writer:
        writer.add(model.state_dict())
    return path

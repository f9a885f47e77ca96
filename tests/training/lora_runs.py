"""What the LoRA tests share: peft's own model in one process, and ranks beside it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

from raymoe.config.lora import LoraConfig
from raymoe.models import load_without_experts, moe_layers
from raymoe.placement import ClusterSpec, Workload
from raymoe.training.checkpoint import Checkpointer, latest
from raymoe.training.export import write_model
from raymoe.training.forms import counted, positions, predict
from raymoe.training.lora import MergedWriter
from raymoe.training.lora_files import write_adapters
from raymoe.training.lora_start import start_lora
from raymoe.training.loss import RouterLogits, balance_loss, router_z_loss, token_loss_sum
from raymoe.training.placing import first_base
from raymoe.training.publication import Publication
from raymoe.training.schedule import learning_rate
from raymoe.training.state import TrainerState, restore
from raymoe.training.trainer import Trainer, TrainerConfig
from tests.tiny_models import tiny_model
from tests.training.equality import BALANCE_WEIGHT, BATCH, LENGTH, OPTIMIZER, Z_WEIGHT, global_batch, owners_of

LORA = {"rank": 3, "alpha": 5.0}


def peft_model(model, seed=3, **options):
    """peft's own model around all of attention and experts, with adapters that change something."""
    linears = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    attention = linears & {"q_proj", "k_proj", "v_proj", "o_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
    config = {
        "target_modules": sorted(attention),
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "task_type": "CAUSAL_LM",
    }
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **(config | options)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


PARTS = {"both": {}, "attention": {"target_parameters": None}, "experts": {"target_modules": []}}


def save_start(family: str, dtype: torch.dtype, folder: Path, parts: str = "both") -> LoraConfig:
    tiny_model(family, dtype=dtype).save_pretrained(folder / "base")
    path = folder / f"given-{parts}"
    peft_model(tiny_model(family, dtype=dtype), **PARTS[parts]).save_pretrained(str(path))
    return LoraConfig(**LORA, adapter=path, attention=parts != "experts", experts=parts != "attention")


@cache
def oracle(family: str, steps: int, parts: str) -> dict[str, torch.Tensor]:
    """Adapters after peft's model has been trained in one process with torch's AdamW."""
    model = tiny_model(family, dtype=torch.float64)
    layers = moe_layers(model)
    adapted = peft_model(model, **PARTS[parts]).train()
    model.set_experts_implementation("eager")
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1.0, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay
    )
    router_logits = RouterLogits(layers)
    chosen: list[torch.Tensor] = []
    for layer in layers:
        layer.router.register_forward_hook(lambda _m, _i, outputs: chosen.append(outputs[2]))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(OPTIMIZER, step, steps)
        batch = global_batch(step)
        num_positions = BATCH * positions(model, layers, LENGTH)
        loss = token_loss_sum(*predict(model, batch)) / counted(model, batch)
        num_experts = layers[0].num_experts
        loads = torch.stack([index.flatten().bincount(minlength=num_experts) for index in chosen])
        chosen.clear()
        logits = router_logits.take()
        loss = loss + BALANCE_WEIGHT * balance_loss(logits, loads, num_positions)
        loss = loss + Z_WEIGHT * router_z_loss(logits, num_positions)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_norm or torch.inf)
        optimizer.step()
    return {name: value.clone() for name, value in peft.get_peft_model_state_dict(adapted).items()}


@dataclass(frozen=True)
class Run:
    """Some steps with adapters on several ranks."""

    base: str
    lora: LoraConfig
    written: Path
    policy: str = "fssdp"
    owners: str = "even"
    dtype: torch.dtype = torch.float64
    steps: int = 5
    config: tuple = ()
    saved_at: int | None = None
    """Step after which a checkpoint is saved and another trainer goes on from it."""


def trainer_of(run: Run, world) -> Trainer:
    model, files = load_without_experts(run.base, run.dtype)
    make_experts = start_lora(model, run.lora, seed=11)
    layers = moe_layers(model)
    owners = owners_of(run.owners, len(layers), layers[0].num_experts, world.size)
    cluster = ClusterSpec(world.nodes, 10**12, 10**12, latency_ns=0, flops_s=1)
    workload = Workload(files.expert_bytes, row_bytes=1, row_flops=1, choices=layers[0].top_k)
    publication = Publication(0, run.policy, cluster, workload, extra_slots=2, overlap_degree=4, window=2)
    config = TrainerConfig(OPTIMIZER, run.steps, publication, BALANCE_WEIGHT, Z_WEIGHT, **dict(run.config))
    return Trainer(model, files, world, config, global_batch, first_base(publication, owners, world), make_experts)


def train(join, rank, runs: list[Run]):
    """Trains each run and writes adapters and merged model; what each rank saw of them."""
    results = []
    for run in runs:
        trainer = trainer_of(run, join())
        reports = []
        for step in range(run.steps):
            if step == run.saved_at:
                trainer = saved_and_restored(run, trainer)
            reports.append(trainer.step(step))
        write_adapters(trainer, run.written / "adapter", run.lora, "base")
        if rank == 0:
            with MergedWriter(run.written / "merged", trainer.model) as writer:
                write_model(trainer, writer)
        else:
            write_model(trainer, None)
        experts = trainer.experts
        results.append(
            {
                "losses": [report.loss for report in reports],
                "resharded": sum(report.resharded for report in reports),
                "copies": sum(report.copies for report in reports),
                "frozen": is_frozen(run, trainer),
                "bytes": experts.state_bytes(),
                "adapters": {
                    place: experts.trained.parameters[slot].clone() for place, slot in experts.pool.slots.items()
                },
            }
        )
    return results


def saved_and_restored(run: Run, trainer: Trainer) -> Trainer:
    world, folder = trainer.world, run.written / "checkpoints"
    checkpointer = Checkpointer(folder, rank=world.rank, size=world.size, group=None)
    checkpointer.save(trainer.next_step, TrainerState(trainer))
    checkpointer.wait()
    checkpointer.close()
    again = trainer_of(run, world)
    path = latest(folder)
    assert path is not None
    restore(again, path)
    return again


def is_frozen(run: Run, trainer: Trainer) -> bool:
    """Whether all weights that are not adapters are what the files hold, bit for bit."""
    model, files = load_without_experts(run.base, run.dtype)
    pool, rows = trainer.experts.pool, trainer.experts.trained
    for (layer, expert), slot in pool.slots.items():
        stored = torch.zeros(pool.layout.numel, dtype=run.dtype)
        files.read(layer, expert, stored)
        if not torch.equal(stored, rows.base[slot]):
            return False
    trained = {name.replace(".base_layer", ""): value for name, value in trainer.model.state_dict().items()}
    return all(torch.equal(trained[name], value) for name, value in model.state_dict().items() if not value.is_meta)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=global_batch(0).tokens[:, :-1]).logits


def plain_opens(path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")


def peft_opens(base, adapter, dtype: torch.dtype):
    return peft.PeftModel.from_pretrained(plain_opens(base, dtype), adapter)

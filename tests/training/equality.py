"""What the equality tests share: one process with the untouched transformers model and plain AdamW, and ranks beside it."""

from dataclasses import dataclass, field

import numpy as np
import torch

from raymoe.config import OptimizerConfig
from raymoe.models import CheckpointWriter, load_without_experts, moe_layers
from raymoe.placement import ClusterSpec, Workload, even_owners
from raymoe.training.batches import Batch
from raymoe.training.export import write_model
from raymoe.training.forms import counted, positions, predict
from raymoe.training.loss import RouterLogits, balance_loss, router_z_loss, token_loss_sum
from raymoe.training.placing import first_base
from raymoe.training.publication import Publication
from raymoe.training.schedule import learning_rate
from raymoe.training.trainer import Trainer, TrainerConfig
from tests.tiny_models import tiny_model, tiny_switch

BALANCE_WEIGHT, Z_WEIGHT = 0.02, 0.01
# large steps and a norm that binds, so that schedule, clipping and weight decay all show in the parameters
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1, clip_norm=0.5)
# what rounding leaves after some AdamW steps; the project promises these two numbers
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
# these families route in float32 whatever the model's dtype: a difference in the last bit of an fp64 hidden state may move a
# logit to the next float32, 6e-8 of it; switch also keeps its routers in float32, so that each of their updates rounds
FLOAT32_ROUTERS = {"deepseek_v2": 1e-7, "deepseek_v3": 1e-7, "switch_transformers": 1e-6}
# phimoe samples its experts while it trains: ranks and one process draw different numbers
SAMPLING_ROUTERS = {"phimoe"}
# 7 sequences: not divisible by 2 or 3 workers
BATCH, LENGTH = 7, 19


@dataclass(frozen=True)
class Case:
    """One training run on several ranks."""

    family: str = "olmoe"
    policy: str = "fssdp"
    owners: str = "even"
    dtype: torch.dtype = torch.float64
    steps: int = 5
    config: dict = field(default_factory=dict)
    """Further fields of the trainer's configuration."""
    published: dict = field(default_factory=dict)
    """Further fields of the publication."""
    nodes: tuple[int, ...] = (0, 0, 0)
    router_losses: bool = True

    def __str__(self) -> str:
        more = [f"{key}={value}" for key, value in {**self.config, **self.published}.items()]
        return "-".join([self.family, self.policy, self.owners, str(self.dtype)[6:], *more])

    @property
    def weights(self) -> tuple[float, float]:
        return (BALANCE_WEIGHT, Z_WEIGHT) if self.router_losses else (0.0, 0.0)

    @property
    def tolerance(self) -> float:
        if self.family in FLOAT32_ROUTERS and self.dtype == torch.float64:
            return FLOAT32_ROUTERS[self.family]
        return TOLERANCE[self.dtype]

    @property
    def oracle(self) -> tuple:
        """What the run of one process depends on."""
        return self.family, self.dtype, self.steps, self.router_losses


def model_of(family: str, dtype: torch.dtype):
    if family == "switch_transformers":
        # what is drawn at random differs between ranks and one process
        return tiny_switch(dtype=dtype, dropout_rate=0.0, router_jitter_noise=0.0)
    return tiny_model(family, dtype=dtype)


def global_batch(step: int) -> Batch:
    # a few tokens often, the rest seldom: experts' loads are uneven
    generator = torch.Generator().manual_seed(100 + step)
    tokens = (96 * torch.rand(BATCH, LENGTH + 1, generator=generator) ** 3).long()
    # some targets are not to be learnt
    return Batch(tokens, torch.rand(BATCH, LENGTH, generator=generator) < 0.8)


def one_process(family: str, dtype: torch.dtype, steps: int, router_losses: bool) -> dict[str, torch.Tensor]:
    """Parameters after training the untouched model with plain AdamW on the same loss."""
    weights = (BALANCE_WEIGHT, Z_WEIGHT) if router_losses else (0.0, 0.0)
    model = model_of(family, dtype).train(family not in SAMPLING_ROUTERS)
    if family != "switch_transformers":
        model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay
    )
    layers = moe_layers(model)
    router_logits = RouterLogits(layers)
    chosen: list[torch.Tensor] = []
    for layer in layers:
        layer.router.register_forward_hook(
            lambda _m, _i, outputs: chosen.append(_counts(outputs, layers[0].num_experts))
        )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIMIZER, step, steps)
        batch = global_batch(step)
        num_positions = BATCH * positions(model, layers, LENGTH)
        loss = token_loss_sum(*predict(model, batch)) / counted(model, batch)
        loads = torch.stack(chosen)
        chosen.clear()
        logits = router_logits.take()
        loss = loss + weights[0] * balance_loss(logits, loads, num_positions)
        loss = loss + weights[1] * router_z_loss(logits, num_positions)
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                # an unfused expert without a token: fused ones get zeros, and decay, and so does everything here
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _counts(outputs: tuple, num_experts: int) -> torch.Tensor:
    """Rows of each expert, int64 [E], from what a router gives: (logits, weights, indices), or switch's mask first."""
    if outputs[2].is_floating_point():
        return outputs[0].flatten(0, -2).sum(0).long()
    return outputs[2].flatten().bincount(minlength=num_experts)[:num_experts]


def owners_of(kind: str, num_layers: int, num_experts: int, size: int) -> np.ndarray:
    if kind == "even":
        return even_owners(num_layers, num_experts, size)
    # the last rank owns most, and in the second layer rank 0 owns nothing
    owners = np.full((num_layers, num_experts), size - 1)
    owners[0, : size - 1] = np.arange(size - 1)
    return owners


def trainer_of(case: Case, path: str, world, saved=None) -> Trainer:
    model, files = load_without_experts(path, case.dtype)
    layers = moe_layers(model)
    owners = owners_of(case.owners, len(layers), layers[0].num_experts, world.size)
    # t above m: Algorithm 1's memory-bound branch, so copies are on some ranks only
    # and devices so slow that copies pay for the cost-benefit form, which starts them with the experts of the layer before
    cluster = ClusterSpec(world.nodes, 10**12, 10**12, latency_ns=0, flops_s=1)
    workload = Workload(files.expert_bytes, row_bytes=1, row_flops=1, choices=layers[0].top_k)
    published = {"extra_slots": 2, "overlap_degree": 4, "window": 2} | case.published
    publication = Publication(0, case.policy, cluster, workload, **published)
    base = first_base(publication, owners, world)
    if saved is not None:
        publication, base = saved
    config = TrainerConfig(OPTIMIZER, case.steps, publication, *case.weights, **case.config)
    trainer = Trainer(model, files, world, config, global_batch, base)
    trainer.model.train(case.family not in SAMPLING_ROUTERS)
    return trainer


def train(join, rank, cases: list[tuple[Case, str, str]]):
    """Trains each case and writes what came; reports of all steps by case."""
    results = []
    for case, path, written in cases:
        trainer = trainer_of(case, path, join(f"node-{case.nodes[rank]}"))
        reports = [trainer.step(step) for step in range(case.steps)]
        if rank == 0:
            with CheckpointWriter(written, trainer.model) as writer:
                write_model(trainer, writer)
        else:
            write_model(trainer, None)
        results.append(reports)
    return results

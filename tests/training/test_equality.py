"""Training on any number of workers equals one process with the untouched transformers model and plain AdamW."""

import numpy as np
import pytest
import torch

from raymoe.config import OptimizerConfig
from raymoe.models import CheckpointWriter, load_without_experts, moe_layers
from raymoe.placement import ClusterSpec, Workload, even_owners
from raymoe.training.loss import RouterLogits, balance_loss, token_loss_sum
from raymoe.training.optimizer import learning_rate
from raymoe.training.publication import Publication
from raymoe.training.trainer import Trainer, TrainerConfig
from tests.tiny_models import tiny_model
from tests.training.ranks import run_ranks

STEPS = 5
BALANCE_WEIGHT = 0.02
# large steps and a norm that binds, so that schedule, clipping and weight decay all show in the parameters
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1, clip_norm=0.5)
# what rounding leaves after five AdamW steps; the project promises these two numbers
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
FAMILIES = {torch.float64: ["olmoe", "gpt_oss"], torch.float32: ["olmoe", "deepseek_v3"]}
# 7 sequences: not divisible by 2 or 3 workers
BATCH, LENGTH = 7, 19


def global_batch(step: int) -> torch.Tensor:
    # a few tokens often, the rest seldom: experts' loads are uneven
    generator = torch.Generator().manual_seed(100 + step)
    return (96 * torch.rand(BATCH, LENGTH + 1, generator=generator) ** 3).long()


def save(family: str, dtype: torch.dtype, folder) -> str:
    path = folder / f"{family}-{dtype}"
    if not path.exists():
        tiny_model(family, dtype=dtype).save_pretrained(path)
    return str(path)


def one_process(family: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The untouched model, plain AdamW, the same loss."""
    model = tiny_model(family, dtype=dtype).train()
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay
    )
    layers = moe_layers(model)
    router_logits = RouterLogits(layers)
    chosen = []
    for layer in layers:
        layer.router.register_forward_hook(lambda _m, _i, outputs: chosen.append(outputs[2]))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIMIZER, step, STEPS)
        batch = global_batch(step)
        tokens = BATCH * LENGTH
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loads = torch.stack([index.flatten().bincount(minlength=layers[0].num_experts) for index in chosen])
        chosen.clear()
        loss = token_loss_sum(logits, batch[:, 1:]) / tokens
        loss = loss + BALANCE_WEIGHT * balance_loss(router_logits.take(), loads, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def owners_of(kind: str, num_layers: int, num_experts: int, size: int) -> np.ndarray:
    if kind == "even":
        return even_owners(num_layers, num_experts, size)
    # the last rank owns most, and in the second layer rank 0 owns nothing
    owners = np.full((num_layers, num_experts), size - 1)
    owners[0, : size - 1] = np.arange(size - 1)
    return owners


def train(join, rank, cases):
    """Parameters after STEPS steps of every case, collected on rank 0, and what travelled."""
    results = []
    for path, dtype, policy, kind, written in cases:
        world = join()
        model, files = load_without_experts(path, dtype)
        layers = moe_layers(model)
        owners = owners_of(kind, len(layers), layers[0].num_experts, world.size)
        # t above m: Algorithm 1's memory-bound branch, so copies are on some ranks only
        # and devices so slow that copies pay for the cost-benefit form, which starts them with the experts of the layer before
        cluster = ClusterSpec.even(1, world.size, intra_bytes_s=10**12, latency_ns=0, flops_s=1)
        workload = Workload(files.expert_bytes, row_bytes=1, row_flops=1)
        publication = Publication(0, policy, cluster, workload, extra_slots=2, overlap_degree=4, window=2)
        config = TrainerConfig(OPTIMIZER, STEPS, BALANCE_WEIGHT, publication)
        trainer = Trainer(model, files, world, config, global_batch, owners)
        reports = [trainer.step(step) for step in range(STEPS)]
        if rank == 0:
            with CheckpointWriter(written, model) as writer:
                trainer.write(writer)
        else:
            trainer.write(None)
        results.append([(report.loss, report.grad_norm, report.moved_bytes, report.copies) for report in reports])
    return results


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parameters_equal_one_process(size, tmp_path):
    cases = [
        (save(family, dtype, tmp_path), dtype, policy, kind, str(tmp_path / f"{family}-{dtype}-{policy}-{kind}-out"))
        for dtype, families in FAMILIES.items()
        for family in families
        for policy in ("ep", "fssdp-paper", "fssdp")
        for kind in ("even", "uneven")
        if policy != "fssdp" or family == "olmoe"
    ]
    from transformers import AutoModelForCausalLM

    expected = {
        (family, dtype): one_process(family, dtype) for dtype, families in FAMILIES.items() for family in families
    }
    by_rank = run_ranks(size, train, cases)

    for number, (path, dtype, policy, kind, written) in enumerate(cases):
        family = path.rsplit("/", 1)[1].split("-")[0]
        where = f"{family} {dtype} {policy} {kind}"
        parameters = AutoModelForCausalLM.from_pretrained(written, dtype=dtype).state_dict()
        for name, value in expected[family, dtype].items():
            error = ((parameters[name].double() - value.double()).norm() / value.double().norm()).item()
            assert error <= TOLERANCE[dtype], f"{where}: {name} off by {error:.1e}"
        losses = [[report[0] for report in ranks[number]] for ranks in by_rank]
        assert all(loss == losses[0] for loss in losses), where
        copies = sum(report[3] for report in by_rank[0][number])
        assert (copies > 0) == (policy != "ep" and size > 1), where
        gathered = sum(report[2].get("sparse_all_gather", 0) for ranks in by_rank for report in ranks[number])
        scattered = sum(report[2].get("sparse_reduce_scatter", 0) for ranks in by_rank for report in ranks[number])
        assert gathered == scattered == copies * expert_bytes(path, dtype), where


def expert_bytes(path: str, dtype: torch.dtype) -> int:
    _, files = load_without_experts(path, dtype)
    return files.expert_bytes

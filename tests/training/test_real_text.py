"""Two hundred steps on real text: two workers under FSSDP beside a plain transformers and AdamW run."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from raymoe.config import DataConfig, OptimizerConfig, TokenizerConfig
from raymoe.models import load_without_experts
from raymoe.placement import ClusterSpec, Workload, even_owners
from raymoe.training.batches import open_batches
from raymoe.training.data.prepare import prepare_data
from raymoe.training.placing import first_base
from raymoe.training.publication import Publication
from raymoe.training.schedule import learning_rate
from raymoe.training.trainer import Trainer, TrainerConfig
from tests.training.ranks import run_ranks

STEPS, BATCH, LENGTH = 200, 8, 64
OPTIMIZER = OptimizerConfig(lr=3e-3, betas=(0.9, 0.98), warmup_steps=20)


def batches(folder):
    return open_batches(folder, sequence_length=LENGTH, global_batch=BATCH, seed=0)


def train(join, rank, folder):
    world = join()
    model, files = load_without_experts(folder / "model", torch.float32)
    cluster = ClusterSpec(world.nodes, 10**12, 10**12, latency_ns=0, flops_s=1)
    publication = Publication(0, "fssdp", cluster, Workload(files.expert_bytes, 1, 1, choices=2), extra_slots=4)
    config = TrainerConfig(OPTIMIZER, STEPS, publication, reshard_every=50)
    base = first_base(publication, even_owners(2, 8, world.size), world)
    trainer = Trainer(model, files, world, config, batches(folder).batch, base)
    reports = [trainer.step(step) for step in range(STEPS)]
    return [report.loss for report in reports], sum(report.copies for report in reports)


def plain(folder, num_parts=1) -> list[float]:
    """transformers and AdamW alone; gradients summed over so many parts of a batch."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay
    )
    losses, source = [], batches(folder)
    for step in range(STEPS):
        tokens = source.batch(step).tokens
        loss = 0.0
        for part in tokens.chunk(num_parts):
            inputs, targets = part[:, :-1], part[:, 1:].contiguous()
            part_loss = model(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss / num_parts
            part_loss.backward()
            loss += part_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm or 0.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIMIZER, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


@pytest.mark.slow
def test_losses_are_those_of_plain_training(tmp_path):
    data = prepare_data(
        DataConfig(sequence_length=LENGTH), TokenizerConfig(vocab_size=1024), None, tmp_path, seed=0, global_batch=BATCH
    )
    config = OlmoeConfig(
        vocab_size=len(data.tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, max_position_embeddings=LENGTH,
        output_router_logits=False,
    )  # fmt: skip
    torch.manual_seed(0)
    OlmoeForCausalLM(config).save_pretrained(tmp_path / "model")
    (ours, copies), _ = run_ranks(2, train, tmp_path, timeout_s=280)
    expected = plain(tmp_path)
    assert copies > STEPS
    assert np.mean(expected[-10:]) < expected[0] - 1
    assert ours[:10] == pytest.approx(expected[:10], rel=1e-5)
    # rounding grows from step to step: how far, plain training shows that adds the same gradients in another order
    noise = np.abs(np.subtract(plain(tmp_path, num_parts=2), expected))
    difference = np.abs(np.subtract(ours, expected))
    print(
        f"differences: {difference.mean():.4f}, at most {difference.max():.4f}; noise {noise.mean():.4f}, {noise.max():.4f}"
    )
    assert difference.mean() < 2 * noise.mean()
    assert difference.max() < 2 * noise.max()

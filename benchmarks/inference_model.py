"""The model of `bench inference`: small, but trained on real text, because random routers have no locality to find."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from rich.console import Console

from raymoe.actors import ray_session
from raymoe.commands.predictor import train_predictor
from raymoe.commands.train import run_training
from raymoe.config import TrainConfig, parse_config
from raymoe.training.job import prepare_text

TEXT = "stdlib"
STEPS = 500
_SHORTEST, _LONGEST = 16, 80
_PREDICTOR = {"sequences": 400, "sequence_length": 128, "steps": 300, "batch": 16, "learning_rate": 2e-3, "seed": 0}


def training_config(output: Path) -> TrainConfig:
    """8 layers of 64 experts, 4 a token (a sixteenth, as in Qwen3-30B), 0.39 MB an expert in fp32; about 15 minutes on two cores."""
    return parse_config(
        TrainConfig,
        {
            "model": {
                "config": {
                    "model_type": "olmoe",
                    "hidden_size": 256,
                    "intermediate_size": 128,
                    "num_hidden_layers": 8,
                    "num_attention_heads": 4,
                    "num_experts": 64,
                    "num_experts_per_tok": 4,
                    "max_position_embeddings": 1024,
                    "router_aux_loss_coef": 0.01,
                    "initializer_range": 0.05,
                }
            },
            "data": {"source": TEXT, "sequence_length": 128, "held_out": 0.05},
            "tokenizer": {"vocab_size": 4096},
            "workers": 2,
            "batch": 16,
            "steps": STEPS,
            "optimizer": {"lr": 2e-3, "betas": (0.9, 0.98), "warmup_steps": 20},
            "output": output,
        },
    )


def trained_model(folder: Path, console: Console, command: str) -> Path:
    """The trained model's directory in `folder`, with its path predictor; trains both unless they are there."""
    model = folder / "model"
    if not (model / "config.json").is_file():
        config = training_config(folder / "training")
        session = ray_session(min_cpus=config.workers, own=True, dashboard=False)
        outcome = run_training(config, console, session, command)
        staged = folder / "model.part"
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(outcome.checkpoint, staged)
        train_predictor(staged, TEXT, console=console, command=command, json=None, **_PREDICTOR)
        staged.rename(model)
    return model


def prompts(folder: Path, count: int) -> list[list[int]]:
    """Token ids of `count` pieces, of 16 to 79 tokens, of the text that was held out in training."""
    config = training_config(folder / "training")
    tokens = prepare_text(config, folder / "training").held_out.tokens
    starts = np.linspace(0, len(tokens) - _LONGEST, count).astype(int)
    lengths = [_SHORTEST + (number * 37) % (_LONGEST - _SHORTEST) for number in range(count)]
    return [tokens[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]

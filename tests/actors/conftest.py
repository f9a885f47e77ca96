import pytest

from raymoe.config import TrainConfig, parse_config
from raymoe.training.job import TrainJob, prepare_job, prepare_text

TINY = {
    "model_type": "olmoe",
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def tiny_tree(folder, **changes) -> dict:
    """The configuration of a small run in a folder, with its text."""
    (folder / "text.txt").write_text("\n\n".join(f"the {i}th line says {i % 7} times seven" for i in range(900)))
    tree = {
        "model": {"config": TINY},
        "data": {"source": str(folder / "text.txt"), "sequence_length": 16},
        "tokenizer": {"vocab_size": 300},
        "batch": 6,
        "steps": 12,
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "output": str(folder / "run"),
    }
    return tree | changes


def tiny_job(folder, **changes) -> TrainJob:
    """A small run in a folder, as its workers get it."""
    config = parse_config(TrainConfig, tiny_tree(folder, **changes))
    return prepare_job(config, config.output, prepare_text(config, config.output))


@pytest.fixture
def job(tmp_path):
    def make(**changes):
        return tiny_job(tmp_path, **changes)

    return make

import gc
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from raymoe.inference import InferenceEngine
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage():
    """transformers collects garbage whenever an engine is closed; all that torch and it have imported need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """family -> (its tiny random model, the directory it is saved in); made once."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def make(family: str) -> tuple[PreTrainedModel, Path]:
        if family not in made:
            model, path = tiny_model(family), tmp_path_factory.mktemp(family)
            model.save_pretrained(path)
            made[family] = model, path
        return made[family]

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def make_engine(saved_model):
    """Small engines that are closed at the end of the test."""
    engines: list[InferenceEngine] = []

    def make(family: str = "olmoe", **options) -> InferenceEngine:
        engines.append(
            InferenceEngine(saved_model(family)[1], **({"max_batch_tokens": 64, "kv_tokens": 1024} | options))
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def random_prompts(lengths: list[int], seed: int = 0, vocab_size: int = 96) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def generate_alone(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens of transformers' own `generate`, one prompt at a time: the truth for the engine."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model_path(tokenizer, tmp_path_factory) -> Path:
    """A tiny OLMoE with that tokenizer, as `raymoe train` would leave it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_model("olmoe", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **special).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

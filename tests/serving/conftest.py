from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from raymoe.training.tokenizer import train_tokenizer
from tests.tiny_models import tiny_model

TEXTS = ["def double(x):\n    return x + x\n", "Gr\u00fc\u00dfe, \u4f60\u597d, caf\u00e9 \U0001f389.\n"] * 20


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, small enough that most characters beyond ASCII take several tokens."""
    return train_tokenizer(TEXTS, 280)


@pytest.fixture(scope="session")
def model_path(tokenizer, tmp_path_factory) -> Path:
    """A tiny OLMoE with that tokenizer, as `raymoe train` would leave it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_model("olmoe", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **special).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

"""A byte-level tokenizer small enough that most characters beyond ASCII take several tokens."""

from functools import cache

from transformers import PreTrainedTokenizerFast

from raymoe.training.tokenizer import train_tokenizer

_TEXTS = ["def double(x):\n    return x + x\n", "Gr\u00fc\u00dfe, \u4f60\u597d, caf\u00e9 \U0001f389.\n"] * 20


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(_TEXTS, 280)

"""A byte-level BPE tokenizer trained on the run's own text, for models that do not bring one."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raymoe.training.data.encode import plain_tokenizer

END_OF_TEXT = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# An answer ends with <|endoftext|>, as a document does, so generation stops at the one token the model knows as the end.
# A system message is plain text ahead of the first marker. OpenAI clients may send content as a list of text parts.
CHAT_TEMPLATE = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- elif content is not none -%}"
    "{%- for part in content -%}"
    "{%- if part.type != 'text' -%}{{ raise_exception('only text content is supported, got ' ~ part.type) }}{%- endif -%}"
    "{{ part.text }}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{ '" + USER + "\n' ~ text(message.content) ~ '\n' }}"
    "{%- elif message.role == 'assistant' -%}"
    "{{ '" + ASSISTANT + "\n' }}"
    # what the marker encloses is what fine-tuning learns
    "{%- generation -%}{{ text(message.content) ~ '" + END_OF_TEXT + "' }}{%- endgeneration -%}"
    "{{ '\n' }}"
    "{%- elif message.role in ['system', 'developer'] -%}{{ text(message.content) ~ '\n' }}"
    "{%- else -%}{{ raise_exception('unknown role ' ~ message.role) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + ASSISTANT + "\n' }}{%- endif -%}"
)

# For a tokenizer that brings neither a template nor tokens for turns; what ends an answer is the tokenizer's own eos. The
# line's end keeps the first token of an answer from beginning before it.
PLAIN_CHAT_TEMPLATE = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- elif content is not none -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{{ 'Assistant:\n' }}{%- generation -%}{{ text(message.content) ~ eos_token }}{%- endgeneration -%}{{ '\n' }}"
    "{%- elif message.role in ['system', 'developer'] -%}{{ text(message.content) ~ '\n' }}"
    "{%- else -%}{{ message.role | capitalize ~ ':\n' ~ text(message.content) ~ '\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:\n' }}{%- endif -%}"
)

_BLOCK_CHARS = 4096


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2, max_bytes: int = 8 << 20
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose tokens can spell any text, so that decoding gives back exactly what was encoded.

    ``<|endoftext|>`` (id 0) ends a document and an answer (eos), stands ahead of the first document (bos) and fills up
    batches in serving (pad); ``encode`` adds none of them. ``<|user|>`` and ``<|assistant|>`` mark the turns of a chat; the
    chat template uses them. The same texts give the same tokenizer, whatever TOKENIZERS_PARALLELISM says.

    Args:
        vocab_size: tokens wanted, special tokens and the 256 bytes included. A small text may have fewer pairs worth
            merging: take ``len(tokenizer)`` as the size of the embedding.
        min_frequency: how often a pair must occur to become a token.
        max_bytes: longer texts are sampled down to at most this many UTF-8 bytes (or one block), in blocks of some KiB
            spread evenly over them; training time grows with it (8 MiB: seconds).

    Raises:
        ValueError: ``vocab_size`` below the minimum, or no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {MIN_VOCAB_SIZE}"
        )
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    sample = _sample(texts, max_bytes)
    if not sample:
        raise ValueError("no text to train a tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        # it would drop spaces ahead of punctuation, and decoding would not be the inverse of encoding
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Hugging Face directory: one trained here, or the one a model came with.

    Raises:
        ValueError: no such directory, no tokenizer in it, one without a ``tokenizers`` backend, or without eos.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"tokenizer directory {str(path)!r} does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        # transformers' own message is a page of advice on downloading
        raise _no_tokenizer(path) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{str(path)!r} holds a {type(tokenizer).__name__}; one with a tokenizer.json is needed")
    # for some families transformers makes up an empty tokenizer where there is none
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise _no_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {str(path)!r} has no eos token, which separates documents. Set eos_token.")
    return tokenizer


def _no_tokenizer(path: Path) -> ValueError:
    found = sorted(entry.name for entry in path.iterdir())
    return ValueError(f"no tokenizer in {str(path)!r}, which holds {found}; save the model's tokenizer there")


def plain_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend that encodes text as it stands: see `plain_tokenizer`.

    The copy leaves the tokenizer that serving shares untouched.
    """
    return plain_tokenizer(tokenizer.backend_tokenizer.to_str())


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    # Halving what is kept, and the stride, whenever it is too much keeps an even spread without knowing the length ahead.
    kept: list[list[str]] = []
    size = 0
    stride = 1
    for i, block in enumerate(_blocks(texts)):
        if i % stride:
            continue
        kept.append(block)
        size += _num_bytes(block)
        while size > max_bytes and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            size = sum(map(_num_bytes, kept))
    return [piece for block in kept for piece in block]


def _num_bytes(block: list[str]) -> int:
    return sum(len(piece.encode()) for piece in block)


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Pieces of texts in blocks of one to two times `_BLOCK_CHARS`, ends of lines first; the last may be shorter.

    Blocks go on from text to text: if the end of each text were one, dropping every second could drop nearly all.
    """
    block: list[str] = []
    length = 0
    for text in texts:
        start = 0
        while start < len(text):
            least, most = start + _BLOCK_CHARS - length, start + 2 * _BLOCK_CHARS - length
            end = text.find("\n", least, most) + 1 or min(most, len(text))
            block.append(text[start:end])
            length += end - start
            start = end
            if length >= _BLOCK_CHARS:
                yield block
                block, length = [], 0
    if block:
        yield block

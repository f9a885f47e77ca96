"""The driver's side of the data: held-out text, tokenizer and background tokenising, from the configuration."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from raymoe.config import DataConfig, TokenizerConfig
from raymoe.telemetry.files import write_text
from raymoe.training.batches import TOKENS_FOLDER, TokenStream, open_batches, pack_encoded
from raymoe.training.data.encode import EncoderSpec
from raymoe.training.data.files import Row
from raymoe.training.data.source import AnyExample, Source
from raymoe.training.data.store import (
    INDEX,
    Index,
    StoreError,
    StoreWriter,
    TokenStore,
    clear_store,
    read_index,
    write_index,
)
from raymoe.training.data.tokenise import Tokenising, default_processes
from raymoe.training.text import Document, split_documents
from raymoe.training.tokenizer import PLAIN_CHAT_TEMPLATE, load_tokenizer, train_tokenizer

TOKENIZER_FOLDER = "tokenizer"

_PROBE_BYTES = 32 << 20
# less than this is tokenised by the driver's own threads before processes have started
_SMALL_BYTES = 16 << 20
_HELD_OUT = "held_out.json"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class PreparedData:
    """What the driver keeps of the data, to watch the tokenising and to evaluate with."""

    tokenizer: PreTrainedTokenizerFast
    held_out: TokenStream
    held_out_documents: list[Document]
    """The text that the learnt tokens of `held_out` stand for: what compressors are measured on."""
    store: TokenStore
    tokenising: Tokenising | None
    """None: the store was there already."""

    @property
    def is_complete(self) -> bool:
        """Whether all text is tokenised; until then the train counts are what is there so far."""
        self._refresh()
        return self.store.is_complete

    @property
    def train_tokens(self) -> int:
        """Tokens to train on."""
        self._refresh()
        return self.store.num_tokens

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes that the learnt ones of them stand for."""
        self._refresh()
        return self.store.index.bytes

    def train_frequencies(self) -> np.ndarray:
        """int64 [V]: how often each token occurs in the training tokens."""
        self._refresh()
        return self.store.frequencies(len(self.tokenizer))

    def check(self) -> None:
        """Raises what the background tokenising failed with, if it did."""
        if self.tokenising is not None:
            self.tokenising.check()

    def join(self) -> None:
        """Waits until all text is tokenised. Raises: as `check`."""
        if self.tokenising is not None:
            self.tokenising.join()

    def close(self) -> None:
        """Stops the tokenising, if it still runs."""
        if self.tokenising is not None:
            self.tokenising.close()

    def _refresh(self) -> None:
        if not self.store.is_complete:
            self.store.index = read_index(self.store.folder)


def prepare_data(
    config: DataConfig,
    tokenizer_config: TokenizerConfig,
    model_path: Path | None,
    folder: Path,
    *,
    seed: int,
    global_batch: int,
    rows: Iterable[Row] | None = None,
) -> PreparedData:
    """Holds some text out, trains or loads the tokenizer (saved to ``folder/tokenizer``), and begins to tokenise the rest
    into ``folder/tokens``, from where ranks read it with `open_batches`.

    Returns when there is enough to train on: all tokens with ``shuffle: all``, else the first window. Tokens that are there
    already and were made from the same are used again. At most the first 32 MiB of the source, or the beginnings of up to 64
    files of it, are looked at to hold some out and to train the tokenizer.

    Args:
        model_path: where a tokenizer is taken from if the configuration names none.
        global_batch: B; there must be at least so many sequences.
        rows: read instead of `config.source`, e.g. from Ray Data.

    Raises:
        ValueError: data that is missing, unreadable or too little; names the file, row and field. A store that is damaged;
            names the file.
        TokeniserDied: a process that tokenises was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = Source(config, rows)
    source_path = tokenizer_config.path or model_path
    loaded = None if source_path is None else _with_template(load_tokenizer(source_path), tokenizer_config)
    digest = _digest(config, tokenizer_config, source, loaded, seed)
    data = _reuse(folder, digest, config)
    if data is None:
        data = _begin(config, tokenizer_config, source, loaded, folder, digest, seed)
    try:
        # refuses too little text; waits for the first window
        open_batches(folder, sequence_length=config.sequence_length, global_batch=global_batch, seed=seed)
        data.check()
    except BaseException as error:
        data.close()
        if isinstance(error, StoreError):
            data.check()  # the row behind it
        raise
    return data


def _begin(
    config: DataConfig,
    tokenizer_config: TokenizerConfig,
    source: Source,
    loaded: PreTrainedTokenizerFast | None,
    folder: Path,
    digest: str | None,
    seed: int,
) -> PreparedData:
    probe = source.probe(_PROBE_BYTES)
    probed_bytes = sum(example.num_bytes for example in probe.examples)
    train, held_out = split_documents(probe.examples, config.held_out, seed, most_bytes=config.held_out_bytes)
    tokenizer = loaded
    if tokenizer is None:
        texts = (example.text for example in train)
        tokenizer = _with_template(train_tokenizer(texts, tokenizer_config.vocab_size), tokenizer_config)
    # before the tokenizer that it belongs to
    clear_store(folder / TOKENS_FOLDER)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    spec = _spec(config, tokenizer, folder)
    encoder: Any = spec.build()
    stream = pack_encoded([encoder(held_out)], spec.eos, min(config.sequence_length, 64))
    documents = [Document(example.name, _counted_text(example)) for example in held_out]
    if probe.is_everything:
        examples: Iterator[AnyExample] = iter(train)
    else:
        names = frozenset(example.name for example in held_out)
        examples = (example for example in source.examples() if example.name not in names)
    processes = config.tokenizer_processes
    if processes is None:
        processes = 0 if probe.is_everything and probed_bytes < _SMALL_BYTES else default_processes()
    index = Index(
        digest=digest,
        dtype="<u2" if len(tokenizer) <= 1 << 16 else "<u4",
        has_counts=config.format != "text",
        shuffle=_window(config),
    )
    writer = StoreWriter(folder / TOKENS_FOLDER, index)
    _write_held_out(folder, stream, documents)
    tokenising = Tokenising(examples, spec, writer, processes)
    tokenising.start()
    return PreparedData(tokenizer, stream, documents, TokenStore(folder / TOKENS_FOLDER), tokenising)


def _reuse(folder: Path, digest: str | None, config: DataConfig) -> PreparedData | None:
    store_folder = folder / TOKENS_FOLDER
    if digest is None or not (store_folder / INDEX).exists():
        return None
    store = TokenStore(store_folder)
    if store.index.digest != digest or not store.is_complete:
        return None
    store.verify()
    if store.index.shuffle != _window(config):
        store.index = replace(store.index, shuffle=_window(config))
        write_index(store_folder, store.index)
    held_out, documents = _read_held_out(folder)
    return PreparedData(load_tokenizer(folder / TOKENIZER_FOLDER), held_out, documents, store, None)


def _digest(
    config: DataConfig,
    tokenizer_config: TokenizerConfig,
    source: Source,
    loaded: PreTrainedTokenizerFast | None,
    seed: int,
) -> str | None:
    identity = source.identity()
    if identity is None:
        return None
    tokenizer = tokenizer_config.vocab_size
    if loaded is not None:
        tokenizer = [loaded.backend_tokenizer.to_str(), loaded.eos_token, loaded.chat_template]
    # what does not change the tokens may change between runs
    options = config.model_dump(exclude={"tokenizer_processes", "sequence_length", "shuffle"})
    content = json.dumps([_VERSION, identity, options, tokenizer, tokenizer_config.chat_template, seed], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _with_template(tokenizer: PreTrainedTokenizerFast, config: TokenizerConfig) -> PreTrainedTokenizerFast:
    if config.chat_template == "plain" and not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return tokenizer


def _window(config: DataConfig) -> int | None:
    return None if config.shuffle == "all" else config.shuffle


def _spec(config: DataConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> EncoderSpec:
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int), "load_tokenizer refuses others"
    return EncoderSpec(config.format, folder / TOKENIZER_FOLDER, tokenizer.backend_tokenizer.to_str(), eos)


def _counted_text(example: AnyExample) -> str:
    return example.text if isinstance(example, Document) else example.counted_text


def _write_held_out(folder: Path, stream: TokenStream, documents: list[Document]) -> None:
    content = {
        "tokens": stream.tokens.tolist(),
        "counts": None if stream.counts is None else stream.counts.astype(int).tolist(),
        "bytes": stream.num_bytes,
        "documents": [[document.name, document.text] for document in documents],
    }
    write_text(folder / TOKENS_FOLDER / _HELD_OUT, json.dumps(content))


def _read_held_out(folder: Path) -> tuple[TokenStream, list[Document]]:
    path = folder / TOKENS_FOLDER / _HELD_OUT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        counts = None if content["counts"] is None else np.array(content["counts"], dtype=bool)
        stream = TokenStream(np.array(content["tokens"], dtype=np.int32), content["bytes"], counts)
        return stream, list(itertools.starmap(Document, content["documents"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is missing or damaged; remove {path.parent} to have the text tokenised anew"
        ) from error

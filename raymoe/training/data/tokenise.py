"""Tokenising in the background: a thread of the driver reads, processes encode, and the tokens go to disk in reading order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import numpy as np

from raymoe.training.data.encode import Encoded, Encoder, EncoderSpec
from raymoe.training.data.examples import chunked
from raymoe.training.data.source import AnyExample
from raymoe.training.data.store import StoreWriter

_CHUNK_BYTES = 1 << 20


class TokeniserDied(RuntimeError):
    """A process that tokenises was killed, most likely for memory."""


class Tokenising:
    """Turns examples into a store, from `start` on, in a thread of its own.

    Memory is bounded: of the source there are two chunks of about 1 MiB a process, or one example if that is longer. The
    store does not depend on the number of processes nor on their speed.

    Args:
        examples: read once, by the thread.
        processes: how many encode; 0: the thread does, with the threads of `tokenizers`.
    """

    def __init__(self, examples: Iterable[AnyExample], spec: EncoderSpec, writer: StoreWriter, processes: int) -> None:
        self._examples, self._spec, self._writer, self._processes = examples, spec, writer, processes
        self._is_stopped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="raymoe-tokenising", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether tokens are still to come."""
        return self._thread.is_alive()

    def check(self) -> None:
        """Raises what the tokenising failed with, if it did: ValueError for a bad row, by file and line; OSError for a full
        disk; TokeniserDied."""
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Waits until all is on disk. Raises: as `check`."""
        self._thread.join()
        self.check()

    def close(self) -> None:
        """Stops and waits for the thread; what is not tokenised by then never will be. Harmless when it is done."""
        self._is_stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._writer.append(np.array([self._spec.eos]), self._no_counts(), 0, 0)
            for encoded in self._encoded():
                self._writer.append(encoded.tokens, encoded.counts, encoded.num_bytes, encoded.num_examples)
                if self._is_stopped.is_set():
                    self._writer.fail("stopped before its end")
                    return
            self._writer.finish()
        except BaseException as error:
            self._error = error
            # the disk may be what failed: then readers run into their timeout
            with suppress(OSError):
                self._writer.fail(str(error))

    def _no_counts(self) -> np.ndarray | None:
        return None if self._spec.format == "text" else np.zeros(1, dtype=bool)

    def _encoded(self) -> Iterator[Encoded]:
        chunks = chunked(self._examples, _CHUNK_BYTES, lambda example: example.num_bytes)
        if self._processes == 0:
            yield from map(self._spec.build(), chunks)
            return
        pool = ProcessPoolExecutor(
            self._processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(self._spec,)
        )
        waiting: deque[tuple[str, Future[Encoded]]] = deque()
        name = ""
        try:
            for chunk in chunks:
                name = waiting[0][0] if waiting else chunk[0].name
                waiting.append((chunk[0].name, pool.submit(_encode, chunk)))
                if len(waiting) >= 2 * self._processes:
                    name, future = waiting.popleft()
                    yield future.result()
            while waiting:
                name, future = waiting.popleft()
                yield future.result()
        except BrokenProcessPool as error:
            raise TokeniserDied(
                f"a process that tokenises died, at {name} or soon after: {error} "
                "If memory ran out, lower data.tokenizer_processes."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def default_processes() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_encoder: Callable[[Any], Encoded] | None = None


def _begin(spec: EncoderSpec) -> None:
    """In the process: one thread, an encoder kept for all chunks, and an end when the driver has died."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C goes to all processes of a terminal; the driver ends this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    encoder: Encoder = spec.build()
    _encoder = encoder


def _encode(chunk: list[Any]) -> Encoded:
    assert _encoder is not None
    return _encoder(chunk)

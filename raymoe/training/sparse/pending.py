"""Transfers under way. A transfer is a generator that yields the messages it has to wait for before it goes on."""

import threading
from collections.abc import Iterator
from functools import cache

import torch
import torch.distributed as dist

Steps = Iterator[list[dist.Work]]


class Pending:
    """A transfer under way; until `wait` has returned, its rows belong to it.

    Once the others have done their part, it raises what broke it: a collective that failed, `RuntimeError`.
    """

    def wait(self) -> None:
        """Returns when this rank's rows hold what they should: on the host, or for what is queued next on a GPU."""

    def poll(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return True


class HostPending(Pending):
    """A transfer that the host has to carry on: in `wait`, or in a thread of its own.

    gloo tells that a point-to-point message has arrived only to who blocks for it, hence a thread and no test.
    """

    def __init__(self, steps: Steps, *, in_background: bool):
        self._steps = steps
        self._works = _advance(steps)
        self._is_done = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if in_background:
            self._start_thread()

    def wait(self) -> None:
        if self._thread is None:
            self._finish()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def poll(self) -> bool:
        if self._thread is None:
            self._start_thread()
        return self._is_done

    def _start_thread(self) -> None:
        # a daemon: one that is stuck with a dead peer must not keep the process from ending
        self._thread = threading.Thread(target=self._finish, name="sparse transfer", daemon=True)
        self._thread.start()

    def _finish(self) -> None:
        try:
            while self._works is not None:
                for work in self._works:
                    work.wait()
                self._works = _advance(self._steps)
        except Exception as error:  # raised by wait(), in the thread that asks
            self._error, self._works = error, None
        self._is_done = True


class QueuedPending(Pending):
    """A transfer that is queued on the device as a whole, on a stream beside the one that computes."""

    def __init__(self, steps: Steps, device: torch.device):
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        self._device, self._done = device, torch.cuda.Event()
        with torch.cuda.stream(stream):
            while (works := _advance(steps)) is not None:
                for work in works:
                    work.wait()
            self._done.record(stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def poll(self) -> bool:
        return self._done.query()


def start(steps: Steps, device: torch.device, *, in_background: bool = False) -> Pending:
    """Sends the first messages of a transfer.

    Args:
        in_background: others wait for what this rank does between its messages, so it must not wait for `Pending.wait`.
    """
    if device.type == "cuda":
        return QueuedPending(steps, device)
    return HostPending(steps, in_background=in_background)


@torch.no_grad()
def _advance(steps: Steps) -> list[dist.Work] | None:
    return next(steps, None)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

"""A rank's reports of its steps, kept for a controller that was not there when they were sent."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from raymoe.training.report import StepReport

_KEPT = 512
"""Of those that arrived: the controller may be lost before the driver has read what it made of them."""
_MOST = 4096
_POLL_S = 0.1


@dataclass
class _Sent:
    epoch: int
    report: StepReport
    answer: ray.ObjectRef | None
    """None: somebody has got it."""
    is_lost: bool = False


class SentReports:
    """Sends reports to the controller, and keeps those that a new one may ask for. Safe to use from several threads.

    A step needs no controller, so workers go on while none is there, until each of them has 4,096 reports: then they wait.
    """

    def __init__(self) -> None:
        self._kept: deque[_Sent] = deque()
        self._lock = threading.Lock()

    def send(
        self, controller: ActorHandle, rank: int, epoch: int, report: StepReport, *, goes_on: Callable[[], bool]
    ) -> None:
        """Does not wait for the answer, but for a controller if there has been none for long.

        Args:
            goes_on: asked now and then whether it is still of use to wait.
        """
        with self._lock:
            self._kept.append(_Sent(epoch, report, controller.report.remote(rank, epoch, report)))
            while len(self._kept) > _KEPT and _has_arrived(self._kept[_KEPT]):
                self._kept.popleft()
        while len(self._kept) >= _MOST and goes_on():
            with self._lock:
                last = self._kept[-1]
                if _has_arrived(last):
                    # whoever got this one has had the time to ask for the others
                    self._kept.popleft()
                elif last.is_lost:
                    last.answer, last.is_lost = controller.report.remote(rank, epoch, last.report), False
            time.sleep(_POLL_S)

    def since(self, epoch: int, known: int) -> list[StepReport]:
        """Of an epoch's steps from `known` on, as far back as they are kept; whoever asks has got them."""
        with self._lock:
            asked = [sent for sent in self._kept if sent.epoch == epoch and sent.report.step >= known]
            for sent in asked:
                sent.answer = None
            return [sent.report for sent in asked]


def _has_arrived(sent: _Sent) -> bool:
    if sent.answer is None:
        return True
    if sent.is_lost or not ray.wait([sent.answer], timeout=0)[0]:
        return False
    try:
        ray.get(sent.answer)
    except RayError:
        sent.is_lost = True
        return False
    sent.answer = None
    return True

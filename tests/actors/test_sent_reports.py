"""What a rank keeps of its reports while a controller comes and goes."""

import os
import time
from types import SimpleNamespace

import pytest
import ray

from raymoe.actors import ray_session, sent_reports
from raymoe.actors.sent_reports import SentReports


@ray.remote(num_cpus=0, max_restarts=-1)
class Controller:
    def __init__(self):
        self._steps = []

    def report(self, rank, epoch, report):
        self._steps.append((epoch, report.step))

    def steps(self):
        return self._steps

    def die(self):
        os._exit(1)


@pytest.fixture(scope="module")
def session():
    with ray_session(min_cpus=2, own=True, dashboard=False):
        yield


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(sent_reports, "_KEPT", 4)
    monkeypatch.setattr(sent_reports, "_MOST", 10)
    monkeypatch.setattr(sent_reports, "_POLL_S", 0.01)


def answers(controller) -> list[tuple[int, int]]:
    """What it has got, and once it is there again."""
    end = time.monotonic() + 60
    while True:
        try:
            return ray.get(controller.steps.remote())
        except ray.exceptions.RayActorError:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_what_nobody_got_is_kept_until_a_new_controller_asks(session, few):
    controller = Controller.remote()
    reports = SentReports()

    def send(*steps, epoch=0, goes_on=lambda: True):
        for step in steps:
            reports.send(controller, 0, epoch, SimpleNamespace(step=step), goes_on=goes_on)

    def kept(epoch=0):
        return [report.step for report in reports.since(epoch, 0)]

    send(*range(5))
    assert answers(controller) == [(0, step) for step in range(5)]
    send(5)
    assert answers(controller)[-1] == (0, 5)

    # while none is there all are kept, also those that the last one got last, up to a point at which the sender waits
    ray.kill(controller)
    asked = []
    send(*range(6, 11), goes_on=lambda: asked.append(1) or False)
    assert not asked
    send(11, goes_on=lambda: asked.append(1) or len(asked) < 5)
    assert len(asked) == 5

    # the next one asks for them, and what it has is let go
    controller = Controller.remote()
    told = kept()
    assert told == list(range(told[0], 12))
    assert told[0] <= 2
    send(12)
    assert answers(controller) == [(0, 12)]
    send(13)
    assert kept() == [9, 10, 11, 12, 13]
    # of an epoch that is over nobody will ask
    send(*range(8), epoch=1)
    answers(controller)
    send(8, epoch=1)
    assert kept() == []
    assert kept(epoch=1) == [4, 5, 6, 7, 8]


def test_it_goes_on_when_a_controller_is_there_again(session, few):
    controller = Controller.remote()
    answers(controller)
    controller.die.remote()
    reports = SentReports()
    for step in range(30):
        # the tenth waits for the restart
        reports.send(controller, 0, 0, SimpleNamespace(step=step), goes_on=lambda: True)
    assert answers(controller)[-1] == (0, 29)

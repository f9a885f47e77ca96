"""Three hosts, each in a network namespace with a real `ray start`, on a bridge that ceases to carry one's packets.

Needs root and iproute2.
"""

import json
import os
import pickle
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.actors.elastic.leftovers import MARK, marked
from tests.actors.elastic.runs import ELASTIC, Undisturbed, check_losses

NUM_HOSTS, PORT = 3, 6391
HEARTBEAT_S = 5
_START_S, _END_S = 8, 3
DRIVER = """
import json, os, pickle, sys, ray
from raymoe.actors import WorkerGroup
address, job, end = sys.argv[1:]
ray.init(address=address, namespace="raymoe", log_to_driver=False)
with WorkerGroup(pickle.load(open(job, "rb"))) as group:
    group.start()
    told = 0
    for step in group.train():
        events = [(event.kind, event.time_s, event.text) for event in group.events[told:]]
        told += len(events)
        print(json.dumps([step.step, step.loss, step.workers, events]), flush=True)
        if os.path.exists(end):
            break
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Why this machine cannot have namespaces; None: it can."""
    if shutil.which("ip") is None:
        return "iproute2's `ip` is not installed"
    tried = subprocess.run(["ip", "netns", "add", "raymoe-try"], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespace can be made here: {tried.stderr.strip()}"
    ip("netns", "delete", "raymoe-try")
    return None


class Hosts:
    """Namespaces `raymoe-0` and so on at 10.83.0.1 and so on, with one cable each to a bridge."""

    def __init__(self, number: int):
        self._number = number
        self._processes: list[subprocess.Popen] = []
        self._folder = tempfile.TemporaryDirectory(prefix="raymoe-", ignore_cleanup_errors=True)

    def __enter__(self) -> "Hosts":
        self._remove()
        ip("link", "add", "raymoe-br", "type", "bridge")
        ip("link", "set", "raymoe-br", "up")
        for host in range(self._number):
            space, cable = f"raymoe-{host}", f"raymoe-c{host}"
            ip("netns", "add", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", "raymoe-br", "up")
            ip("-n", space, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.terminate()
        time.sleep(_END_S)
        for pid in marked():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._remove()
        self._folder.cleanup()

    def address(self, host: int) -> str:
        return f"10.83.0.{host + 1}"

    def start(self, host: int, *command: str, **popen) -> subprocess.Popen:
        """Runs something there until the end."""
        process = subprocess.Popen(["ip", "netns", "exec", f"raymoe-{host}", *command], **popen)
        self._processes.append(process)
        return process

    @property
    def head(self) -> str:
        """The address of Ray's head."""
        return f"{self.address(0)}:{PORT}"

    def start_ray(self) -> None:
        """`ray start` on each host, with one CPU; returns when all are in."""
        ray = str(Path(sys.executable).with_name("ray"))
        # the paths of its sockets must be short
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self._folder.name}"]
        for host in range(self._number):
            where = [*(head if host == 0 else [f"--address={self.head}"]), f"--node-ip-address={self.address(host)}"]
            command = [ray, "start", *where, "--num-cpus=1", "--block", "--disable-usage-stats"]
            self.start(host, *command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
            time.sleep(_START_S)

    def cut_off(self, host: int) -> None:
        """Its packets go nowhere from now on, and its own end of the cable does not show it."""
        ip("link", "set", f"raymoe-c{host}", "nomaster")

    def _remove(self) -> None:
        for host in range(self._number):
            subprocess.run(["ip", "link", "delete", f"raymoe-c{host}"], capture_output=True)
            subprocess.run(["ip", "netns", "delete", f"raymoe-{host}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", "raymoe-br"], capture_output=True)


@pytest.fixture
def hosts(monkeypatch):
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setenv(MARK, f"hosts-{os.getpid()}")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with Hosts(NUM_HOSTS) as these:
        yield these
    until = time.monotonic() + _END_S
    while marked() and time.monotonic() < until:
        time.sleep(0.1)
    assert not marked()


@dataclass(frozen=True)
class Step:
    """What the driver tells of one."""

    step: int
    loss: float
    workers: int


class Told:
    """Steps and events as the driver, on a host of its own, prints them."""

    def __init__(self, driver: subprocess.Popen):
        assert driver.stdout is not None
        self._lines = driver.stdout
        self.steps: list[Step] = []
        self.events: list[tuple[str, float, str]] = []

    def read(self) -> Step:
        """The next step."""
        line = self._lines.readline()
        assert line, "the driver has ended"
        *step, events = json.loads(line)
        self.steps.append(Step(*step))
        self.events += events
        return self.steps[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_host_whose_packets_are_swallowed(hosts, job, tmp_path):
    hosts.start_ray()
    asked = job(**ELASTIC | {"heartbeat_s": HEARTBEAT_S, "workers": {"min": NUM_HOSTS - 1, "max": NUM_HOSTS}})
    path, end = tmp_path / "job.pickle", tmp_path / "end"
    path.write_bytes(pickle.dumps(asked))
    driver = hosts.start(
        0, sys.executable, "-c", DRIVER, hosts.head, str(path), str(end), stdout=subprocess.PIPE, text=True
    )
    told = Told(driver)
    while len(told.steps) < 20:
        assert told.read().workers == NUM_HOSTS

    cut_s = time.time()
    hosts.cut_off(NUM_HOSTS - 1)
    while told.steps[-1].workers == NUM_HOSTS:
        told.read()
    for _ in range(20):
        assert told.read().workers == NUM_HOSTS - 1
    kinds = [kind for kind, *_ in told.events]
    assert kinds[:2] == ["death", "rollback"]
    _, found_s, text = told.events[0]
    assert f"has not answered for {HEARTBEAT_S} s" in text
    # asked twice a second, and the last answer was a moment ago
    assert HEARTBEAT_S - 1 < found_s - cut_s < HEARTBEAT_S + 2
    end.touch()
    while driver.poll() is None:
        driver.stdout.readline()
    assert driver.returncode == 0
    check_losses(Undisturbed(asked, tmp_path), told.steps)

"""Random events for a quarter of an hour: `make soak`. RAYMOE_SOAK_S sets the seconds, RAYMOE_TEST_SEED the schedule,
RAYMOE_SOAK_RESULT a Markdown file for what happened."""

import itertools
import os
import random
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from raymoe.actors import WorkerGroup, WorkersFailed
from raymoe.telemetry import run_meta
from raymoe.training.checkpoint import latest
from tests.actors.elastic.runs import ELASTIC, SEED, TOLERANCE, Run, check_losses, set_nodes
from tests.actors.elastic.traps import POINTS

SECONDS = float(os.environ.get("RAYMOE_SOAK_S", "900"))
RESULT = os.environ.get("RAYMOE_SOAK_RESULT")
NUM_NODES = 4
PATIENCE_S = 240
KINDS = {
    "kill": 4,
    "kill two at once": 2,
    "kill all but one": 1,
    "kill half way": 5,
    "stop": 1,
    "terminate": 1,
    "kill the controller": 1,
    "scale": 2,
    "drain": 1,
    "lose a node": 1,
}
"""What happens, by how often."""
OVER = 0.8
"""How often it is waited until the run has got over an event before the next one."""
SOAK = ELASTIC | {
    "workers": {"min": 1, "max": NUM_NODES},
    "heartbeat_s": 10,
    "batch": 12,
}


@dataclass(frozen=True)
class Happened:
    """One event of the schedule."""

    kind: str
    at_s: float
    """Seconds since 1970."""


class Storm:
    """Does at random what may happen to a run."""

    def __init__(self, cluster, group, run, traps, rng):
        self._cluster, self._group, self._run, self._traps, self._rng = cluster, group, run, traps, rng
        self.happened: list[Happened] = []

    def next(self) -> None:
        """One event, and mostly the wait until the run has got over it; somebody who comes may still be on the way."""
        kind = self._rng.choices(list(KINDS), list(KINDS.values()))[0]
        print(f"step {self._run.steps[-1].step}: {kind}", flush=True)
        time.sleep(0.1 * self._rng.random())
        self.happened.append(Happened(kind, time.time()))
        getattr(self, "_" + kind.replace(" ", "_"))()
        if self._rng.random() < OVER:
            # steps that are done so late were done after it
            over_s = time.time() + 2 + 6 * self._rng.random()
            self._run.when(lambda: self._run.steps[-1].at_s > over_s)
        set_nodes(self._cluster, NUM_NODES)

    def _states(self):
        while True:
            try:
                return self._group.states()
            except WorkersFailed:  # somebody is just being found dead
                self._run.read(1)

    def _signal(self, number, which=signal.SIGKILL) -> None:
        states = self._states()
        for state in self._rng.sample(states, min(number, len(states))):
            try:
                os.kill(state.pid, which)
            except ProcessLookupError:
                continue

    def _kill(self) -> None:
        self._signal(1)

    def _kill_two_at_once(self) -> None:
        self._signal(2)

    def _kill_all_but_one(self) -> None:
        self._signal(len(self._states()) - 1)

    def _stop(self) -> None:
        self._signal(1, signal.SIGSTOP)

    def _terminate(self) -> None:
        self._signal(1, signal.SIGTERM)

    def _kill_half_way(self) -> None:
        """Somebody falls into a trap, if the way that leads there is taken."""
        members = [state.member for state in self._states()]
        point = self._rng.choice(sorted(POINTS.keys() - {"save"}))
        self._traps.set(point, self._rng.choice([*members, max(members) + 1]))
        if point in ("rollback", "move", "rehearse"):
            self._signal(1)

    def _kill_the_controller(self) -> None:
        ray.kill(self._group.controller, no_restart=False)

    def _scale(self) -> None:
        self._group.scale(self._rng.randint(2, NUM_NODES))

    def _drain(self) -> None:
        """A notice, and the node is taken away when its time has come, whoever may be left there."""
        node = self._rng.choice(sorted(self._cluster.worker_nodes, key=lambda each: each.node_id))
        grace_s = self._rng.choice((1, 10))
        reason, deadline_ms = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, int((time.time() + grace_s) * 1000)
        GcsClient(address=self._cluster.address).drain_node(node.node_id, reason, "soak", deadline_ms)
        until = time.monotonic() + grace_s
        while time.monotonic() < until:
            self._run.read(1)
        self._cluster.remove_node(node)

    def _lose_a_node(self) -> None:
        node = self._rng.choice(sorted(self._cluster.worker_nodes, key=lambda each: each.node_id))
        self._cluster.remove_node(node, allow_graceful=False)


@pytest.mark.soak
@pytest.mark.timeout(SECONDS * 3 + 900)
def test_random_events(cluster, job, traps, undisturbed_of, leaves_nothing, tmp_path):
    print(f"seed {SEED}, {SECONDS:g} s")
    set_nodes(cluster, NUM_NODES)
    folder = tmp_path / "checkpoints"
    asked = job(**SOAK, checkpoint={"folder": str(folder), "every_steps": 40}, env=traps.env)
    with WorkerGroup(asked) as group:
        group.start()
        run = Run(group, PATIENCE_S)
        run.read(1)
        run.when(lambda: latest(folder) is not None)
        storm = Storm(cluster, group, run, traps, random.Random(SEED))
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            storm.next()
        group.scale(NUM_NODES)
        run.with_workers(NUM_NODES)
        run.read(20)
        events = Counter(run.kinds())
    check_losses(undisturbed_of(SOAK), run.steps)
    leaves_nothing.check()
    if RESULT is not None:
        Path(RESULT).write_text(page(run, storm.happened, events))


def stood_still(run, happened) -> list[float]:
    """For each event the longest time without a new step from then to the next event, in seconds."""
    ends = [each.at_s for each in happened[1:]] + [run.steps[-1].at_s]
    found = []
    for each, end in zip(happened, ends, strict=True):
        pairs = itertools.pairwise(run.steps)
        found.append(max((b.at_s - a.at_s for a, b in pairs if b.at_s > each.at_s and a.at_s <= end), default=0.0))
    return found


def page(run, happened, events) -> str:
    """Markdown."""
    meta = run_meta("make soak")
    host, versions = meta["host"], ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    lines = [
        "# Random events, one after another",
        "",
        f"`make soak`: {SECONDS:g} s, seed {SEED} (`tests/actors/elastic/test_soak.py`)",
        "",
        f"{meta['date']}; {host['cores']} cores ({host['cpu']}), {host['ram_gib']} GiB; {versions}",
        "",
        f"{len(happened)} events, {len(run.steps)} steps: each was done, and each has the loss of a run in which nothing happens,",
        f"within {TOLERANCE:g} in float64. Nothing was left afterwards: no process, actor, placement group, port, shared memory.",
        "",
        "| event | count | seconds without a new step: median | worst |",
        "| --- | --- | --- | --- |",
    ]
    still = list(zip(happened, stood_still(run, happened), strict=True))
    for kind in KINDS:
        if times := [seconds for each, seconds in still if each.kind == kind]:
            lines.append(f"| {kind} | {len(times)} | {statistics.median(times):.1f} | {max(times):.1f} |")
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(events.items()))
    return "\n".join([*lines, "", f"What the run said of itself: {told}.", ""])

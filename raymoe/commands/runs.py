"""`raymoe status`, `raymoe scale`, `raymoe drain`: training runs that are under way in the cluster."""

import time
from pathlib import Path

import ray
from ray.actor import ActorHandle
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raymoe.actors import RunEvent, joined_session
from raymoe.actors.find_runs import find_controllers
from raymoe.actors.orders import RunState
from raymoe.telemetry import write_json

_SHOWN_EVENTS = 12
_ANSWER_S = 30


def status(run: str | None, watch_s: float | None, console: Console, command: str, json: Path | None) -> None:
    """Shows every run of the cluster, or one of them; with `watch_s` again and again until it ends.

    Raises:
        ValueError: there is no such run.
    """
    with joined_session():
        controllers = find_controllers(run)
        looks = {name: _Look(controller) for name, controller in controllers.items()}
        for look in looks.values():
            look.look()
        if json is not None:
            write_json(json, command, [look.row() for look in looks.values()])
        if watch_s is None:
            for look in looks.values():
                console.print(look.shown())
            return
        with Live(Group(*(look.shown() for look in looks.values())), console=console, auto_refresh=False) as live:
            while any(look.state.failure is None for look in looks.values()):
                time.sleep(watch_s)
                try:
                    for look in looks.values():
                        look.look()
                except ray.exceptions.RayActorError:
                    return  # the run is over
                live.update(Group(*(look.shown() for look in looks.values())), refresh=True)


def scale(num_workers: int, run: str | None, console: Console) -> None:
    """Has so many workers in a run from now on.

    Raises:
        ValueError: there is no such run, or there are several and none is named.
    """
    with joined_session():
        name, controller = _only(find_controllers(run))
        ray.get(controller.scale.remote(num_workers), timeout=_ANSWER_S)
        console.print(f"{name}: {num_workers} workers, as soon as there is room", highlight=False)


def drain(node: str, run: str | None, console: Console) -> None:
    """Moves the workers of all runs, or of one, off a node.

    Args:
        node: its id, or the beginning of it, or its address.

    Raises:
        ValueError: there is no such run or node.
    """
    with joined_session():
        found = _node_id(node)
        for name, controller in find_controllers(run).items():
            ray.get(controller.drain.remote(found), timeout=_ANSWER_S)
            console.print(f"{name}: workers leave node {found[:12]}", highlight=False)


def _only(controllers: dict[str, ActorHandle]) -> tuple[str, ActorHandle]:
    if len(controllers) > 1:
        raise ValueError(f"several runs are under way, name one with --run: {', '.join(controllers)}")
    return next(iter(controllers.items()))


def _node_id(node: str) -> str:
    nodes = [each for each in ray.nodes() if each["Alive"]]
    fitting = [each for each in nodes if each["NodeID"].startswith(node) or each["NodeManagerAddress"] == node]
    if len(fitting) != 1:
        known = ", ".join(f"{each['NodeID'][:12]} ({each['NodeManagerAddress']})" for each in nodes)
        raise ValueError(f"node {node!r}: {'several fit' if fitting else 'there is none'}; the cluster has {known}")
    return fitting[0]["NodeID"]


class _Look:
    """One run, as it was when it was last looked at."""

    def __init__(self, controller: ActorHandle):
        self._controller = controller
        self._known_steps = 0
        self._tokens_per_s: float | None = None
        self._loss: float | None = None
        self._events: list[RunEvent] = []
        self.state: RunState

    def look(self) -> None:
        asked = self._controller.progress.remote(self._known_steps, len(self._events))
        steps, events, self.state = ray.get(asked, timeout=_ANSWER_S)
        self._events += events
        if steps:
            self._known_steps = steps[-1].step + 1
            recent = steps[-20:]
            self._tokens_per_s = sum(step.tokens for step in recent) / sum(step.step_s for step in recent)
            self._loss = steps[-1].loss

    def row(self) -> dict[str, object]:
        """For `--json`."""
        state = self.state
        return {
            "run": state.run,
            "epoch": state.epoch,
            "next_step": state.next_step,
            "tokens_per_s": self._tokens_per_s,
            "loss": self._loss,
            "min": state.least,
            "max": state.most,
            "waits_for": state.waits_for,
            "failure": state.failure,
            "workers": [
                {
                    "member": worker.member,
                    "rank": worker.rank,
                    "node": worker.node,
                    "phase": worker.phase,
                    "experts": sum(worker.owned_experts),
                    "snapshot_step": worker.snapshot_step,
                    "state_bytes": sum(worker.state_bytes.values()),
                    "snapshot_bytes": sum(worker.snapshot_bytes.values()),
                }
                for worker in state.workers
            ],
            "events": [event.text for event in self._events],
        }

    def shown(self) -> Group:
        """For people."""
        state = self.state
        speed = "" if self._tokens_per_s is None else f", {self._tokens_per_s:,.0f} tokens/s, loss {self._loss:.3f}"
        head = Text(f"{state.run}", style="bold")
        head.append(
            f"  epoch {state.epoch}, step {state.next_step}{speed}; {len(state.members)} workers, "
            f"{state.least} to {state.most} wanted",
            style="not bold",
        )
        if state.waits_for is not None:
            head.append(f"\nwaits for {state.waits_for}", style="yellow")
        if state.failure is not None:
            head.append(f"\n{state.failure}", style="red")
        table = Table("worker", "rank", "node", "does", "experts", "state MB", "snapshots MB", "last snapshot")
        for worker in state.workers:
            table.add_row(
                str(worker.member), "-" if worker.rank is None else str(worker.rank), worker.node[:12], worker.phase,
                f"{sum(worker.owned_experts)}", f"{sum(worker.state_bytes.values()) / 1e6:,.0f}",
                f"{sum(worker.snapshot_bytes.values()) / 1e6:,.0f}",
                "-" if worker.snapshot_step is None else f"step {worker.snapshot_step}",
            )  # fmt: skip
        events = Text()
        for event in self._events[-_SHOWN_EVENTS:]:
            at = time.strftime("%H:%M:%S", time.localtime(event.time_s))
            events.append(f"{at}  step {event.step:>6}  {event.kind:<10} {event.text}\n")
        return Group(head, table, events)

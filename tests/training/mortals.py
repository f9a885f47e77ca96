"""Training processes that can be killed, and a controller's part played by a test: who is alive, who goes on, from what."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from raymoe.models import CheckpointWriter
from raymoe.training.export import write_model
from raymoe.training.regroup import FromSnapshots, Live, enter_epoch, evacuate
from raymoe.training.shadow import Shadow
from raymoe.training.snapshot import Snapshots, choose_step
from raymoe.training.state import TrainerState
from raymoe.training.world import World, join_world, leave_world
from tests.training.equality import Case, trainer_of
from tests.training.test_resume import bits

# one process imports torch and transformers, all others are forked from it
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.training.mortals"])
_WAIT_S = 60


class Mortals:
    """Members of a run, by number. `node_of` says where each lives."""

    def __init__(self, case: Case, path: Path, folder: Path, node_of: Callable[[int], str] = lambda member: "node-0"):
        self._case, self._path, self._folder, self._node_of = case, path, folder, node_of
        self._pipes: dict[int, Any] = {}
        self._processes = {}
        self._epoch = 0
        self.members: tuple[int, ...] = ()
        """Of the present epoch, by rank."""
        self.publication: Any = None
        self.losses: dict[int, float] = {}
        """Of every step, as it was last done."""

    def __enter__(self) -> "Mortals":
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()

    def create(self, *members: int) -> None:
        """Starts processes; nobody is in an epoch yet."""
        for member in members:
            self._pipes[member], theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_live, args=(theirs, member, self._case, str(self._path), self._node_of(member)), daemon=True
            )
            process.start()
            theirs.close()
            self._processes[member] = process

    def start(self, *members: int) -> None:
        """The first epoch, from the model's files."""
        self.members = members
        self.publication = self._ask(members, "start", self._rendezvous(), members)[members[0]]

    def run(self, to_step: int, every: int = 2, kill: tuple[int, int, str] | None = None) -> list[int]:
        """Trains up to a step, with snapshots; `kill` is (member, step, phase). Returns who is left."""
        answers = self._ask(self.members, "run", to_step, every, kill)
        for losses in answers.values():
            self.losses |= losses
        return [member for member in self.members if member in answers]

    def regroup(self, *members: int) -> FromSnapshots:
        """A new epoch after deaths, from the newest snapshot."""
        living = [member for member in members if member in self.members]
        held = self._ask(living, "held")
        source = choose_step(held)
        self.enter(source, *members)
        return source

    def enter(self, source: Live | FromSnapshots, *members: int) -> dict:
        nodes = [self._node_of(member) for member in members]
        places = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
        cluster = replace(self.publication.cluster, node_of=tuple(places[node] for node in nodes))
        self.publication = replace(self.publication, version=self.publication.version + 1, cluster=cluster)
        self.members = members
        return self._ask(members, "enter", self._rendezvous(), members, self.publication, source, self._epoch)

    def rehearse(self, member: int) -> None:
        """A joiner warms up, while the others train."""
        self._ask([member], "rehearse", f"file://{self._folder}/rehearsal{member}")

    def join(self, member: int) -> None:
        """Takes a member in at a step boundary."""
        survivors = tuple(range(len(self.members)))
        self._ask(self.members, "leave")
        self.enter(Live((*survivors, None)), *self.members, member)

    def part(self, member: int) -> None:
        """Lets a member go, at a step boundary and with nothing lost."""
        rank = self.members.index(member)
        self._ask(self.members, "evacuate", [rank])
        self._ask(self.members, "leave")
        survivors = tuple(each for each in range(len(self.members)) if each != rank)
        self.kill(member)
        self.enter(Live(survivors), *(each for each in self.members if each != member))

    def ask(self, what: str, *args) -> dict:
        """Of all members, by number."""
        return self._ask(self.members, what, *args)

    def kill(self, *members: int) -> None:
        for member in members:
            self._processes[member].kill()
            self._processes[member].join()

    def _rendezvous(self) -> str:
        self._epoch += 1
        return f"file://{self._folder}/world{self._epoch}"

    def _ask(self, members, what: str, *args) -> dict:
        """What the living answer."""
        for member in members:
            self._pipes[member].send((what, args))
        answers = {}
        for member in members:
            try:
                assert self._pipes[member].poll(_WAIT_S), f"member {member} does not answer to {what}"
                answers[member] = self._pipes[member].recv()
            except EOFError:
                continue
            if isinstance(answers[member], Exception):
                raise answers[member]
        return answers


class _Life:
    """One member's process."""

    def __init__(self, member: int, case: Case, path: str, node: str):
        self._member, self._case, self._path, self._node = member, case, path, node
        self._snapshots = Snapshots()

    def start(self, rendezvous: str, members):
        self._join(rendezvous, members)
        self._trainer = trainer_of(self._case, self._path, self._world)
        self._snapshots.attach(self._world, 1, self._trainer.placing.commits)
        return self._trainer.placing.publications.applied

    def rehearse(self, rendezvous: str):
        """A joiner's warm-up in a world of its own."""
        world = join_world(rendezvous, 0, 1, timeout_s=30, node=self._node, member=self._member)
        self._trainer = trainer_of(replace(self._case, owners="even"), self._path, world)
        self._trainer.step(0)
        leave_world()

    def enter(self, rendezvous: str, members, publication, source, epoch: int):
        leave_world()
        self._join(rendezvous, members)
        if self._case.config.get("dense") == "sharded":
            self._trainer = trainer_of(replace(self._case, owners="even"), self._path, self._world)
        enter_epoch(self._trainer, self._world, publication, source, self._snapshots)
        self._snapshots.attach(self._world, epoch, self._trainer.placing.commits)
        # at once: what the dead kept for the living is gone
        self._snapshots.take(TrainerState(self._trainer))
        self._snapshots.wait()
        return self._trainer.next_step

    def run(self, to_step: int, every: int, kill):
        losses = {}
        trainer = self._trainer
        if kill is not None and kill[0] == self._member:
            self._arm(*kill[1:])
        try:
            while trainer.next_step < to_step:
                step = trainer.next_step
                losses[step] = trainer.step(step).loss
                if trainer.next_step % every == 0:
                    self._snapshots.take(TrainerState(trainer))
            self._snapshots.wait()
        except RuntimeError:
            leave_world()
        return losses

    def snap(self):
        """Another one at once, wherever the steps stand."""
        self._snapshots.take(TrainerState(self._trainer), is_agreed=True)
        self._snapshots.wait()

    def held(self):
        return self._snapshots.held()

    def bits(self):
        return bits(self._trainer)

    def shadow_bits(self, step: int):
        """The own snapshot of a step, by the names of `bits`."""
        held = next(each for each in self._snapshots.held() if (each.member, each.step) == (self._member, step))
        tensors = self._snapshots.shadow(held.member, held.step, held.epoch).tensors()
        found = {}
        for key, tensor in tensors.items():
            if key[0] == "dense":
                found[key[1]] = tensor
            elif key[0] == "expert":
                found[f"{key[3]}/{(key[1], key[2])}"] = tensor
        return {name: tensor.clone().view(torch.uint8).numpy() for name, tensor in found.items()}

    def groups(self):
        """Groups of gloo in this process: each has a thread that polls."""
        return sum((task / "comm").read_text() == "gloo_tcp_loop\n" for task in Path("/proc/self/task").iterdir())

    def owners(self):
        return self._trainer.placing.base.owners

    def evacuate(self, leaving):
        return evacuate(self._trainer, leaving)

    def leave(self):
        leave_world()

    def write(self, path: str):
        if self._world.rank == 0:
            with CheckpointWriter(path, self._trainer.model) as writer:
                write_model(self._trainer, writer)
        else:
            write_model(self._trainer, None)

    def _join(self, rendezvous: str, members) -> None:
        self._world: World = join_world(
            rendezvous, members.index(self._member), len(members), timeout_s=30, node=self._node, member=self._member
        )

    def _arm(self, step: int, phase: str) -> None:
        """Lets this process die in the middle of a step."""

        def die(*_):
            if self._trainer.next_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        layer = self._trainer.moe_layers[-1].block
        if phase == "forward":
            layer.register_forward_pre_hook(die)
        elif phase == "backward":
            layer.register_full_backward_hook(die)
        elif phase == "take":
            # some of it is written, and the step is not
            write = Shadow.write

            def half(shadow, number, layout, tensors):
                broken = dict(tensors)
                broken.popitem()
                if number != step:
                    return write(shadow, number, layout, tensors)
                try:
                    return write(shadow, number, layout, broken)
                finally:
                    os.kill(os.getpid(), signal.SIGKILL)

            Shadow.write = half
        else:
            raise ValueError(phase)


def _live(pipe: Connection, member: int, case: Case, path: str, node: str) -> None:
    torch.set_num_threads(1)
    life = _Life(member, case, path, node)
    while True:
        try:
            what, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(life, what)(*args))
        except Exception as error:  # the test shows it
            pipe.send(error)

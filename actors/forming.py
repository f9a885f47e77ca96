"""How an epoch comes to be: who is in it, what they plan from, where their state comes from."""

import time
from pathlib import Path

import ray

from raymoe.actors.elastic_log import ElasticLog
from raymoe.actors.orders import EpochOrder, WorkerFacts, WorkerState
from raymoe.actors.roster import Roster, answers, explain, is_death, reason
from raymoe.actors.step_book import StepBook
from raymoe.errors import RunFailed
from raymoe.telemetry import metrics
from raymoe.training.checkpoint import latest
from raymoe.training.job import TrainJob
from raymoe.training.publication import Publication
from raymoe.training.regroup import FromSnapshots, Live
from raymoe.training.snapshot import SnapshotsLost, choose_step

_ANSWER_S = 15.0


class EnterFailed(Exception):
    """An epoch could not be formed; `dead` says who is gone and why."""

    def __init__(self, dead: dict[int, str]):
        super().__init__(str(dead))
        self.dead = dead


class Forming:
    """Forms the epochs of a run; `facts` is what the ranks of the last one found."""

    def __init__(self, job: TrainJob, roster: Roster, book: StepBook, log: ElasticLog):
        self._job, self._roster, self._book, self._log = job, roster, book, log
        self._nodes: dict[int, str] = {}
        self.facts: list[WorkerFacts] = []
        self.began_at = 0
        """The first step of the last epoch."""

    def first(self, members: list[int], timeout_s: float, resumes: Path | None) -> EpochOrder:
        """The first epoch of a run.

        Args:
            resumes: the checkpoint that it goes on from.

        Raises:
            RunFailed: the workers cannot be placed in time, or one fails.
        """
        states, errors = answers(self._roster.call(members, "state"), timeout_s, stop_early=True)
        if errors:
            raise RunFailed(explain(errors))
        if len(states) < len(members):
            raise RunFailed(self._no_room(len(members), timeout_s))
        nodes = self._numbered(states)
        return self._start(members, self._job.first_publication(nodes), resumes)

    def find(self) -> EpochOrder | None:
        """The epoch that is under way although this controller has just begun: another was here before it."""
        members = self._roster.find()
        if not members:
            return None
        orders = answers(self._roster.call(members, "order"), _ANSWER_S)[0]
        newest = max((order for order in orders.values() if order), key=lambda order: order.number, default=None)
        if newest is None:
            self._roster.end()
            return None
        for member in set(members) - set(newest.members):
            self._roster.dismiss(member)
        facts = answers(self._roster.call(newest.members, "facts"), _ANSWER_S)[0]
        self._numbered(answers(self._roster.call(newest.members, "state"), _ANSWER_S)[0])
        if not facts:
            raise RunFailed("a new controller found no worker that answers")
        found = next(iter(facts.values()))
        self._begin(newest, [facts.get(member, found) for member in newest.members], is_under_way=True)
        told = answers(self._roster.call(newest.members, "reports", newest.number, 0), _ANSWER_S)[0]
        self._book.catch_up({rank: told[member] for rank, member in enumerate(newest.members) if member in told})
        self._log.add("controller", self._book.next_step, f"a new controller found epoch {newest.number}")
        return newest

    def change(self, order: EpochOrder, staying: list[int], joining: list[int]) -> EpochOrder:
        """The next epoch, of those who stay and those who come; nothing is rolled back. Raises: EnterFailed."""
        members, leaving = [*staying, *joining], [member for member in order.members if member not in staying]
        began = time.monotonic()
        if self._job.config.dense == "sharded":
            source = self._snapshot(order, staying)
        else:
            if leaving and staying:
                ranks = [order.members.index(member) for member in leaving]
                self._all(list(order.members), self._roster.call(order.members, "evacuate", ranks))
            source = Live(tuple(order.members.index(each) if each in order.members else None for each in members))
        following = self._enter(order, members, source)
        stopped_s = time.monotonic() - began
        step = self.facts[0].next_step
        for member in joining:
            text = f"worker {member} joined; {len(members)} workers"
            self._log.add("join", step, text, worker=member, epoch=following.number, stopped_s=stopped_s)
        for member in leaving:
            text = f"worker {member} left, its experts stayed; {len(members)} workers"
            self._log.add("leave", step, text, worker=member, epoch=following.number, stopped_s=stopped_s)
        return following

    def source_of(self, living: list[int]) -> FromSnapshots | None:
        """What the living can go back to together; None: only to a checkpoint on disk.

        Raises:
            EnterFailed: not all of them live.
            RunFailed: there is none either; says what was lost.
        """
        held, errors = answers(self._roster.call(living, "held"), _ANSWER_S)
        broken = {member: error for member, error in errors.items() if not is_death(error)}
        if broken:
            raise RunFailed(explain(broken))
        if len(held) < len(living):
            gone = {member: reason(error) for member, error in errors.items()}
            raise EnterFailed({member: gone.get(member, "did not answer") for member in living if member not in held})
        try:
            return choose_step(held)
        except SnapshotsLost as lost:
            self.newest_checkpoint(str(lost))
            return None

    def newest_checkpoint(self, lost: str) -> Path:
        """What the run falls back to on disk.

        Args:
            lost: what happened to all that was in memory, to be told.

        Raises:
            RunFailed: there is none.
        """
        folder = self._job.config.checkpoint.folder
        newest = latest(folder) if folder is not None else None
        if newest is None:
            where = f"no complete checkpoint lies in {folder}" if folder else "no 'checkpoint.folder' is set"
            raise RunFailed(f"{lost}; {where}, so the run cannot go on")
        self._log.add("fallback", self._book.next_step, f"{lost}; back to {newest}", checkpoint=str(newest))
        return newest

    def _snapshot(self, order: EpochOrder, staying: list[int]) -> FromSnapshots:
        """One of this very step. Raises: EnterFailed."""
        for method in ("settle", "snap"):
            self._all(list(order.members), self._roster.call(order.members, method))
        return choose_step(self._all(staying, self._roster.call(staying, "held")))

    def again(self, order: EpochOrder, members: list[int], source: FromSnapshots | None) -> EpochOrder:
        """The next epoch after a loss. Raises: EnterFailed."""
        before = self._book.next_step
        began = time.monotonic()
        if source is None:
            folder = self._job.config.checkpoint.folder
            publication = self._publication(members)
            following = self._start(members, publication, latest(folder) if folder else None, order.number + 1)
        else:
            following = self._enter(order, members, source)
        step = self.facts[0].next_step
        values = {"epoch": following.number, "restore_s": time.monotonic() - began, "repeats": before - step}
        text = f"epoch {following.number}: {len(members)} workers go on with step {step}, {before - step} steps are repeated"
        self._log.add("rollback", step, text, **values)
        return following

    def _enter(self, order: EpochOrder, members: list[int], source: Live | FromSnapshots) -> EpochOrder:
        publication = self._publication(members)
        measures = len(members) > 1 and self.facts and self.facts[0].links is None and not publication.is_measured
        following = EpochOrder(
            order.number + 1, self._meeting(members), tuple(members), publication, source,
            measures_links=bool(measures) and self._job.config.experts.cluster is None,
        )  # fmt: skip
        self._form(following)
        return following

    def _start(self, members: list[int], publication: Publication, resumes: Path | None, number: int = 0) -> EpochOrder:
        order = EpochOrder(
            number, self._meeting(members), tuple(members), publication, resumes=resumes, measures_links=True
        )
        try:
            self._form(order)
        except EnterFailed as failed:
            if number:
                raise
            member, why = min(failed.dead.items())
            raise RunFailed(f"worker {member} {why}") from None
        return order

    def _form(self, order: EpochOrder) -> None:
        facts = self._all(list(order.members), self._roster.call(order.members, "enter", order))
        self._begin(order, [facts[member] for member in order.members])

    def _begin(self, order: EpochOrder, facts: list[WorkerFacts], *, is_under_way: bool = False) -> None:
        self.facts, self.began_at = facts, facts[0].next_step
        metrics.TRAIN_WORKERS.set(len(facts))
        self._book.begin_epoch(order.number, facts, is_under_way=is_under_way)

    def _all(self, members: list[int], calls: dict[ray.ObjectRef, int]) -> dict:
        """What all answer; frees them from each other if one does not."""
        results, errors = answers(calls, self._job.config.worker_timeout_s, stop_early=True)
        if len(results) == len(members):
            return results
        self._roster.free(set(members) - errors.keys())
        late = {ref: member for ref, member in calls.items() if member not in results and member not in errors}
        _, more = answers(late, 2 * _ANSWER_S)
        errors |= more
        dead = {member: reason(error) for member, error in errors.items() if is_death(error)}
        dead |= {member: "did not answer" for member in members if member not in results and member not in errors}
        if not dead:
            raise RunFailed(explain(errors))
        raise EnterFailed(dead)

    def _publication(self, members: list[int]) -> Publication:
        missing = [member for member in members if member not in self._nodes]
        states = answers(self._roster.call(missing, "state"), _ANSWER_S)[0]
        self._nodes |= {member: state.node for member, state in states.items()}
        names = [self._nodes.get(member, "") for member in members]
        places = {name: number for number, name in enumerate(dict.fromkeys(names))}
        last = self._book.publication
        assert last is not None, "an epoch was there before"
        return self._job.next_publication(last, tuple(places[name] for name in names))

    def _numbered(self, states: dict[int, WorkerState]) -> tuple[int, ...]:
        self._nodes |= {member: state.node for member, state in states.items()}
        names = [states[member].node for member in sorted(states)]
        places = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return tuple(places[name] for name in names)

    def _meeting(self, members: list[int]) -> str:
        found, errors = answers(self._roster.call(members[:1], "rendezvous"), _ANSWER_S)
        if not found:
            raise EnterFailed({members[0]: reason(errors[members[0]]) if errors else "did not answer"})
        return found[members[0]]

    def _no_room(self, wanted: int, timeout_s: float) -> str:
        config = self._job.config
        free = ray.available_resources()
        return (
            f"{wanted} workers could not be placed within {timeout_s:g} s. They need {config.worker_cpus:g} CPUs and "
            f"{config.worker_gpus:g} GPUs each; free in the cluster: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs. "
            "Lower 'workers', free resources, or raise 'worker_timeout_s'."
        )

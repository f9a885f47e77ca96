"""The life of a run: epochs, one after another, formed of whoever is there. Runs in a thread of the controller.

An epoch ends because its steps are done, because a publication stops it (somebody comes or leaves: nothing is lost), or because
a worker is gone (all go back to the last snapshot that the living hold together).
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from raymoe.actors.elastic_log import ElasticLog
from raymoe.actors.forming import EnterFailed, Forming
from raymoe.actors.orders import EpochOrder, Outcome, WorkerFacts, WorkerState
from raymoe.actors.recruiting import Recruiting, room
from raymoe.actors.roster import DIED, Roster, answers, explain, is_death, reason
from raymoe.actors.step_book import StepBook
from raymoe.actors.watching import Watching
from raymoe.actors.wishes import Wishes
from raymoe.errors import RunFailed
from raymoe.training.job import TrainJob

logger = logging.getLogger("raymoe")

_POLL_S = 0.05
_ALONE_S = 0.2
"""From the first sign that an epoch is broken to when workers that still wait in a collective are freed from outside."""
_GRACE_S = 3.0
"""From the first sign that an epoch is broken to when a worker that has said nothing counts as dead."""
_FRUITLESS_EPOCHS = 3
_ALL_LOST = "the controller and all workers died together"


@dataclass
class _End:
    """How an epoch ended."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    dead: dict[int, str] = field(default_factory=dict)
    """Why, by member."""

    def has(self, kind: str) -> bool:
        return any(outcome.kind == kind for outcome in self.outcomes.values())

    @property
    def is_broken(self) -> bool:
        return bool(self.dead) or self.has("broken") or self.has("failed")


class EpochKeeper:
    """Keeps a run going until `wishes.is_over`; `failure` says why it could not.

    Args:
        me: the controller, to which workers report.
    """

    def __init__(self, job: TrainJob, wishes: Wishes, roster: Roster, book: StepBook, log: ElasticLog, me: ActorHandle):
        self._job, self.wishes, self._roster, self._book, self._log, self._me = job, wishes, roster, book, log, me
        self._recruiting = Recruiting(job, roster, log)
        self._forming = Forming(job, roster, book, log)
        self._watching = Watching(job.config.heartbeat_s, roster, wishes)
        self.order: EpochOrder | None = None
        """Of the epoch in force."""
        self.reached = 0
        """Steps done and waited for by nobody any more."""
        self.saved: str | None = None
        """The folder that the model was last written to."""
        self.failure: str | None = None
        self.waits_for: str | None = None
        """What training stands still for."""
        self._fruitless = 0
        self._lost_until = 0

    @property
    def states(self) -> dict[int, WorkerState]:
        """What every worker last said."""
        return self._watching.states

    @property
    def facts(self) -> list[WorkerFacts]:
        """What the ranks of the last epoch found as it began."""
        return self._forming.facts

    def run(self) -> None:
        """Returns when the run is over or has failed; all workers are gone then."""
        try:
            self._keep()
        except RunFailed as error:
            self.failure = str(error)
        except Exception as error:
            logger.exception("the run's keeper failed")
            self.failure = f"the controller failed: {type(error).__name__}: {error}"
        finally:
            if self.failure is not None:
                self._log.add("failed", self._book.next_step, self.failure)
            self._recruiting.ask_for_capacity(0)
            self._roster.end()

    def _keep(self) -> None:
        self.order = self._forming.find() or self._first()
        while not self.wishes.is_over:
            if self.reached >= self.wishes.until:
                if self.wishes.save_to in (None, self.saved):
                    time.sleep(_POLL_S)
                else:
                    self.order = self._save(self.order, self.wishes.save_to)
                continue
            until = self.wishes.until
            end = self._follow(self.order, until)
            if self.wishes.is_over:
                return
            if end.is_broken:
                self.order = self._after_death(self.order, end)
            elif end.has("stopped"):
                self.order = self._change(self.order)
            else:
                self.reached = until

    def _first(self) -> EpochOrder:
        self._recruiting.ask_for_capacity(self.wishes.most)
        wanted = max(self.wishes.least, min(self.wishes.most, room(self._job.config)))
        # before workers are asked for: with nothing to go on from there is no use in them
        resumes = self._forming.newest_checkpoint(_ALL_LOST) if self.wishes.until else self._job.resumes
        members = [self._roster.hire() for _ in range(wanted)]
        return self._forming.first(members, self._job.config.worker_timeout_s, resumes)

    # one epoch

    def _follow(self, order: EpochOrder, until: int) -> _End:
        """Lets an epoch's workers train; returns when all have stopped, or are dead."""
        self._roster.call(order.members, "run", order.number, until, self._me, self.wishes.keeps_records)
        calls = self._roster.call(order.members, "follow", order.number, until)
        end, broken_s, is_stopping, is_aborted = _End(), None, False, False
        end.dead |= {member: "is gone" for member in order.members if member not in self._roster}
        self._watching.begin(order)
        while calls and not self.wishes.is_over:
            done, _ = ray.wait(list(calls), timeout=_POLL_S)
            for ref in done:
                member = calls.pop(ref)
                try:
                    end.outcomes[member] = ray.get(ref)
                except RayError as error:
                    end.dead[member] = reason(error)
            for member in self._watching.hung(calls.values()):
                end.dead.setdefault(member, f"has not answered for {self._job.config.heartbeat_s:g} s")
            if end.is_broken:
                now = time.monotonic()
                broken_s = broken_s or now
                left = set(calls.values()) - end.dead.keys()
                if left and not is_aborted and now - broken_s > _ALONE_S:
                    self._roster.free(left)
                    is_aborted = True
                if now - broken_s > _GRACE_S:
                    end.dead |= dict.fromkeys(left, "did not come out of a broken collective")
                if set(calls.values()) <= end.dead.keys():
                    break
            elif not done and not is_stopping and self._wants_change(order):
                stop = self._book.next_publication(is_stop=True)
                self._roster.call(order.members, "publish", stop)
                is_stopping = True
        return end

    def _wants_change(self, order: EpochOrder) -> bool:
        """Whether somebody is to come or to leave, and training can go on then."""
        leaving, avoid = self._watching.leaving(order), self.wishes.leaving_nodes
        staying = len(order.members) - len(leaving)
        if self._book.next_step <= self._lost_until:
            # a process that starts takes cores from those that make up for lost steps
            return bool(leaving) and staying > 0
        wanted = max(0, self.wishes.most - staying)
        self._recruiting.ask_for_capacity(self.wishes.most)
        self._recruiting.look(wanted, max(self.wishes.most, len(order.members)), self._book.next_step, avoid)
        joining = min(len(self._recruiting.ready), wanted)
        comes = joining > 0 and self._recruiting.is_settled
        if not leaving or staying + joining:
            return comes or bool(leaving)
        # nobody would be left to learn from, but those who come may need the room of those who go
        return len(leaving) > 1 and self._watching.leave_room(leaving)

    def _save(self, order: EpochOrder, path: str) -> EpochOrder:
        """Writes the model. If a worker is gone, its last steps are repeated by the others first."""
        calls = self._roster.call(order.members, "save", Path(path))
        dead = dict.fromkeys(set(order.members) - set(calls.values()), "is gone")
        results, errors = answers(calls, self._job.config.worker_timeout_s, stop_early=True)
        dead |= {member: reason(error) for member, error in errors.items() if is_death(error)}
        if dead:
            self._roster.free(set(order.members) - dead.keys())
            self.reached = 0
            return self._recover(order, dead)
        if errors:
            raise RunFailed(f"saving {path} failed: {explain(errors)}")
        if silent := set(calls.values()) - results.keys():
            raise RunFailed(
                f"saving {path}: workers {', '.join(map(str, sorted(silent)))} were not done within "
                f"{self._job.config.worker_timeout_s:g} s; raise 'worker_timeout_s'"
            )
        self.saved = path
        self._log.add("saved", self.reached, f"the model, to {path}")
        return order

    # from one epoch to the next

    def _change(self, order: EpochOrder) -> EpochOrder:
        """Somebody comes or leaves; nothing is rolled back."""
        leaving = self._watching.leaving(order)
        if self._job.config.dense == "sharded":
            # one after another: its part is with its buddy, which must stay
            leaving = leaving[:1]
        staying = [member for member in order.members if member not in leaving]
        joining = self._recruiting.take(max(0, self.wishes.most - len(staying)))
        if not staying:
            # those who come learn from somebody, who leaves once they are there
            staying, leaving = leaving[:1], leaving[1:]
        try:
            following = self._forming.change(order, staying, joining)
        except EnterFailed as failed:
            return self._recover(order, failed.dead, joining)
        for member in leaving:
            self._roster.dismiss(member)
        return self._at_least(following)

    def _after_death(self, order: EpochOrder, end: _End) -> EpochOrder:
        """Workers are gone, or a collective broke."""
        failed = [(member, outcome) for member, outcome in end.outcomes.items() if outcome.kind == "failed"]
        if failed and not end.dead:
            member, outcome = failed[0]
            raise RunFailed(f"worker {member} failed: {outcome.error}")
        has_progress = self._book.next_step > self._forming.began_at
        self._fruitless = 0 if has_progress else self._fruitless + 1
        if not end.dead and not has_progress:
            member, outcome = next((m, o) for m, o in end.outcomes.items() if o.kind == "broken")
            raise RunFailed(f"worker {member} failed: {outcome.error}")
        if self._fruitless >= _FRUITLESS_EPOCHS:
            raise RunFailed(
                f"{self._fruitless} times in a row workers died before a step was done; the last: "
                + "; ".join(f"worker {member} {why}" for member, why in end.dead.items())
            )
        return self._recover(order, end.dead)

    def _recover(self, order: EpochOrder, dead: dict[int, str], joined: Iterable[int] = ()) -> EpochOrder:
        """The living go on from what they hold together.

        Args:
            joined: those who were on their way into the epoch that did not come about.
        """
        self._lost_until = self._book.next_step
        living = [*order.members, *joined]
        while True:
            for member, why in dead.items():
                self._log.add("death", self._book.next_step, f"worker {member} {why}", worker=member)
                self._roster.dismiss(member, None if why.startswith(DIED) else self.states.get(member))
            living = [member for member in living if member not in dead]
            joining: list[int] = []
            try:
                source = self._forming.source_of(living)
                joining = self._staffed(living)
                return self._forming.again(order, [*living, *joining], source)
            except EnterFailed as failed:
                dead = failed.dead
                living = [*living, *joining]

    def _at_least(self, order: EpochOrder) -> EpochOrder:
        """Waits below the least number of workers, and takes in who comes."""
        if len(order.members) >= self.wishes.least:
            return order
        joining = self._staffed(list(order.members))
        try:
            return self._forming.change(order, list(order.members), joining)
        except EnterFailed as failed:
            return self._recover(order, failed.dead, joining)

    def _staffed(self, living: list[int]) -> list[int]:
        """Workers that join the living at once; waits until they are enough together."""
        since, config = time.monotonic(), self._job.config
        told = False
        while len(living) + len(self._recruiting.ready) < self.wishes.least:
            if self.wishes.is_over:
                raise RunFailed("the run was stopped while it waited for workers")
            wanted = self.wishes.most - len(living)
            self._recruiting.ask_for_capacity(self.wishes.most)
            self._recruiting.look(wanted, self.wishes.most, self._book.next_step, self.wishes.leaving_nodes)
            waited_s = time.monotonic() - since
            missing = self.wishes.least - len(living) - len(self._recruiting.ready)
            self.waits_for = (
                f"{missing} more workers of {config.worker_cpus:g} CPUs and {config.worker_gpus:g} GPUs each, for "
                f"{waited_s:.0f} s so far; {len(living)} are there, at least {self.wishes.least} are needed"
            )
            if not told and waited_s > 1:
                self._log.add("waiting", self._book.next_step, f"for {self.waits_for}")
                told = True
            if config.workers.wait_s is not None and waited_s > config.workers.wait_s:
                raise RunFailed(f"waited for {self.waits_for}; raise 'workers.wait_s' or lower 'workers.min'")
            time.sleep(_POLL_S)
        self.waits_for = None
        return self._recruiting.take(max(0, self.wishes.most - len(living)))

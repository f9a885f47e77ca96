"""What a person sees while a command runs: stages with their outcome, and a bar for training."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:  # what only reads or plans needs no Ray
    from raymoe.actors import StepSummary

_LINES = 20
_COUNTED_LINES = 10
_RECENT_STEPS = 50


@contextmanager
def stage(console: Console, name: str) -> Iterator[Callable[[str], None]]:
    """Shows that `name` is under way, then one line with what `say` was told and how long it took."""
    outcome = ""

    def say(text: str) -> None:
        nonlocal outcome
        outcome = text

    started = time.perf_counter()
    with console.status(f"{name} ..."):
        yield say
    console.print(
        f"[bold]{name:<11}[/bold] {outcome} [dim]({time.perf_counter() - started:.1f} s)[/dim]", highlight=False
    )


@contextmanager
def counted(console: Console, title: str, total: int, unit: str = "step") -> Iterator[Callable[..., None]]:
    """A bar that `advance(text="")` moves by one; on a console that is no terminal, ten lines in all."""
    bar = Progress(
        TextColumn(f"[bold]{title:<11}[/bold]"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    every = -(-total // _COUNTED_LINES)
    done = 0

    def advance(text: str = "") -> None:
        nonlocal done
        done += 1
        bar.update(task, advance=1, text=text)
        if not console.is_terminal and (done % every == 0 or done == total):
            console.print(f"{unit} {done:>5}/{total}  {text}".rstrip(), highlight=False)

    with bar:
        task = bar.add_task(title, total=total, text="")
        yield advance


class TrainingProgress:
    """A bar with step, loss, tokens/s, imbalance and the time that is left, by the median of the last steps; on a console that is
    no terminal, a line now and then.

    Args:
        steps: the run's, from its very beginning.
        first: the first step to come.
    """

    def __init__(self, console: Console, steps: int, first: int = 0):
        self._console, self._steps, self._first = console, steps, first
        self._every = max(1, (steps - first) // _LINES)
        self._recent_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._bar = Progress(
            TextColumn("[bold]training   [/bold]"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=first, numbers="", left="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: StepSummary) -> None:
        """A step is done."""
        self._recent_s.append(step.step_s)
        done = step.step + 1
        left = f"{duration((self._steps - done) * statistics.median(self._recent_s))} left"
        numbers = (
            f"loss {step.loss:.3f}  {step.tokens_per_s:,.0f} tok/s  "
            f"imbalance {step.expert_imbalance:.2f} -> {step.worker_imbalance:.2f}"
        )
        self._bar.update(self._task, completed=done, numbers=numbers, left=left)
        if not self._console.is_terminal and ((step.step - self._first) % self._every == 0 or done == self._steps):
            self._console.print(f"step {done:>5}/{self._steps}  {numbers}  {left}", highlight=False)

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        name, _, text = line.partition(" ")
        self._console.print(f"[bold]{name}[/bold] {escape(text)}", highlight=False)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03 or 4:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

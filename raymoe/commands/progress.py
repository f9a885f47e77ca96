"""What a person sees while a command runs: stages with their outcome, and a bar for training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:  # what only reads or plans needs no Ray
    from raymoe.actors import StepSummary

_LINES = 20


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


class TrainingProgress:
    """A bar with step, loss, tokens/s and expert imbalance; on a console that is no terminal, a line now and then."""

    def __init__(self, console: Console, steps: int):
        self._console, self._steps = console, steps
        self._every = max(1, steps // _LINES)
        self._bar = Progress(
            TextColumn("[bold]training   [/bold]"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, numbers="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: StepSummary) -> None:
        numbers = (
            f"loss {step.loss:.3f}  {step.tokens_per_s:,.0f} tok/s  "
            f"imbalance {step.expert_imbalance:.2f} -> {step.worker_imbalance:.2f}"
        )
        self._bar.update(self._task, completed=step.step + 1, numbers=numbers)
        if not self._console.is_terminal and (step.step % self._every == 0 or step.step == self._steps - 1):
            self._console.print(f"step {step.step + 1:>5}/{self._steps}  {numbers}", highlight=False)

"""Where the values of a training run go besides the screen: JSON lines, TensorBoard, and what other packages bring.

Another package offers a logger by an entry point of the group ``raymoe.loggers``, whose name is the one to give in ``logs`` and
whose object makes a logger from that entry's options::

    [project.entry-points."raymoe.loggers"]
    wandb = "my_package:WandbLogger"        # WandbLogger({"project": "x"}) -> RunLogger
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from raymoe.config.logs import LogConfig
from raymoe.telemetry.loggers_jsonl import JsonLinesLogger
from raymoe.telemetry.loggers_tensorboard import TensorBoardLogger

logger = logging.getLogger("raymoe")

GROUP = "raymoe.loggers"
JSONL_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class RunLogger(Protocol):
    """Takes a run's values as they come, in the driver's process. It may raise: then it is dropped, and the run goes on."""

    def start(self, run: dict[str, Any]) -> None:
        """The run begins or goes on: ``run["config"]`` is its configuration, ``run["next_step"]`` the first step to come.
        What was logged of that step and later ones by a run that ended without a checkpoint of them will come again."""
        ...

    def step(self, number: int, values: dict[str, float]) -> None:
        """A step is done, counting from 0; values by name, such as ``train/loss``."""
        ...

    def event(self, number: int, name: str, fields: dict[str, Any]) -> None:
        """Something happened that does not happen in every step, before or in step ``number``."""
        ...

    def end(self, summary: dict[str, Any]) -> None:
        """The run is over; the logger writes what it holds back and closes."""
        ...


class RunLog:
    """All loggers of a run as one, none of which can stop it: one that raises is named once in a warning, and dropped.

    Use as a context manager: leaving it before ``end`` tells the loggers that the run broke off.
    """

    def __init__(self, loggers: Iterable[tuple[str, RunLogger]]):
        self._loggers = list(loggers)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.end({"ended": "broke off" if error is None else f"{type(error).__name__}: {error}"})

    def start(self, run: Mapping[str, Any]) -> None:
        """See ``RunLogger``."""
        self._tell(lambda each: each.start(dict(run)))

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """See ``RunLogger``."""
        self._tell(lambda each: each.step(number, dict(values)))

    def event(self, number: int, name: str, fields: Mapping[str, Any]) -> None:
        """See ``RunLogger``."""
        self._tell(lambda each: each.event(number, name, dict(fields)))

    def end(self, summary: Mapping[str, Any]) -> None:
        """See ``RunLogger``; the loggers are told once."""
        self._tell(lambda each: each.end(dict(summary)))
        self._loggers = []

    def _tell(self, what: Callable[[RunLogger], None]) -> None:
        for name, each in list(self._loggers):
            try:
                what(each)
            except Exception as error:
                self._loggers.remove((name, each))
                logger.warning(
                    "logs: %s failed and gets no more of this run: %s: %s", name, type(error).__name__, error
                )


def open_loggers(configs: Sequence[LogConfig], folder: Path) -> RunLog:
    """Makes the loggers that a configuration asks for; nothing is written before ``start``.

    Args:
        folder: of the run, where files go unless a configuration says otherwise.

    Raises:
        ValueError: no logger of that name, or one that cannot be made; says why, and which there are.
    """
    return RunLog([(config.name, _open(config, folder)) for config in configs])


def _open(config: LogConfig, folder: Path) -> RunLogger:
    options = config.options
    if config.name == "jsonl":
        return JsonLinesLogger(Path(options.get("path", folder / JSONL_FILE)))
    if config.name == "tensorboard":
        return TensorBoardLogger(Path(options.get("folder", folder / TENSORBOARD_FOLDER)))
    offered = {point.name: point for point in metadata.entry_points(group=GROUP)}
    if config.name not in offered:
        raise ValueError(
            f"logs: there is no logger '{config.name}'; there are {', '.join(['jsonl', 'tensorboard', *sorted(offered)])}. "
            f"Others come with packages that have an entry point of the group {GROUP}"
        )
    point = offered[config.name]
    try:
        return point.load()(options)
    except Exception as error:
        origin = f" of {point.dist.name}" if point.dist is not None else ""
        raise ValueError(
            f"logs: the logger '{config.name}'{origin} cannot be used: {type(error).__name__}: {error}"
        ) from error

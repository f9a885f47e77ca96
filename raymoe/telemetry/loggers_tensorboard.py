"""A training run for TensorBoard, by the event writer of the ``tensorboard`` package: it needs no torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore[reportMissingImports]


class TensorBoardLogger:
    """Values as scalars of their names; the run, its events and its summary as text. Every start adds a file; TensorBoard reads in
    it that the steps to come replace those that files before it have.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboard.compat.proto import event_pb2  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                "logs: tensorboard is not installed; install raymoe[tensorboard], or leave it out of 'logs'"
            ) from None
        self._folder = folder
        self._writer: EventFileWriter | None = None
        self._newest = 0

    def start(self, run: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportMissingImports]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore[reportMissingImports]

        self._folder.mkdir(parents=True, exist_ok=True)
        next_step = run.get("next_step", 0)
        self._writer = EventFileWriter(str(self._folder), flush_secs=10)
        # TensorBoard forgets what earlier files in the folder say of this step and later ones
        self._add(next_step, session_log=SessionLog(status=SessionLog.START))
        self._add_text(next_step, "run", run)

    def step(self, number: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports]

        self._newest = number
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(number, summary=Summary(value=scalars))

    def event(self, number: int, name: str, fields: dict[str, Any]) -> None:
        self._add_text(number, f"events/{name}", fields)

    def end(self, summary: dict[str, Any]) -> None:
        if self._writer is not None:
            self._add_text(self._newest, "summary", summary)
            self._writer.close()
            self._writer = None

    def _add_text(self, number: int, tag: str, content: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # pyright: ignore[reportMissingImports]
        from tensorboard.compat.proto.tensor_pb2 import TensorProto  # pyright: ignore[reportMissingImports]
        from tensorboard.compat.proto.types_pb2 import DT_STRING  # pyright: ignore[reportMissingImports]

        # indented by four: Markdown shows it as it stands
        text = "\n".join("    " + line for line in json.dumps(content, indent=2, default=str).splitlines())
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        self._add(number, summary=Summary(value=[Summary.Value(tag=tag, metadata=kind, tensor=tensor)]))

    def _add(self, number: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports]

        assert self._writer is not None, "start() comes first"
        self._writer.add_event(Event(wall_time=time.time(), step=number, **what))

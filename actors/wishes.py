"""What is asked of a run from outside."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from raymoe.telemetry.files import write_text


@dataclass
class Wishes:
    """Read by the keeper, written by the controller's other threads; kept in a file for a controller that is restarted."""

    most: int
    """Workers to have when there is room."""
    least: int
    """Workers to go on with."""
    until: int = 0
    """Steps to do."""
    keeps_records: bool = True
    leaving_nodes: set[str] = field(default_factory=set)
    save_to: str | None = None
    """A folder for the trained model, once the steps are done."""
    is_over: bool = False

    def save(self, path: Path) -> None:
        """Writes them, whole or not at all."""
        write_text(path, json.dumps(asdict(self) | {"leaving_nodes": sorted(self.leaving_nodes)}))

    @staticmethod
    def load(path: Path) -> "Wishes":
        """What `save` wrote."""
        told = json.loads(path.read_text(encoding="utf-8"))
        return Wishes(**told | {"leaving_nodes": set(told["leaving_nodes"])})

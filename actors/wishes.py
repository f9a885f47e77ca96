"""What is asked of a run from outside."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


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
    is_over: bool = False

    def save(self, path: Path) -> None:
        """Writes them, whole or not at all."""
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(asdict(self) | {"leaving_nodes": sorted(self.leaving_nodes)}), encoding="utf-8")
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> "Wishes":
        """What `save` wrote."""
        told = json.loads(path.read_text(encoding="utf-8"))
        return Wishes(**told | {"leaving_nodes": set(told["leaving_nodes"])})

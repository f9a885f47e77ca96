"""What workers of these tests have changed as they import it.

Traps are named points of the product's code at which a process looks whether it is to die, or to wait, right there. A trap is a
file, `<point>.<member>`, in a folder that all nodes see. The worker with that number takes it away and does what it says: `die`,
at once and without a word, or `wait`, until somebody takes `<point>.<member>.waits` away.

The model's family rounds to float32 in its norms, its attention and its router, also in float64. Sooner or later a last bit that
differs falls on the other side of such a rounding (in step 381 of a soak), is 1e-8 then, and grows. So workers compute in
float64 all through, and so does the run that they are compared with.
"""

import functools
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

POINTS = {
    # ranks are about to meet in a new epoch
    "meet": ("raymoe.training.world", "join_world"),
    # going back to a snapshot: all ranks have met, experts are about to be sent
    "rollback": ("raymoe.training.regroup", "_restore_experts"),
    # somebody comes or leaves: all ranks have met, experts are about to move
    "move": ("raymoe.training.regroup", "move_experts"),
    # a new worker rehearses a step alone
    "rehearse": ("raymoe.training.job", "TrainJob.rehearsing_trainer"),
    # a snapshot is on its way to the buddy; see `_HALF_SENT`
    "snapshot": ("raymoe.training.snapshot", "_post"),
    # a rank's part of a checkpoint is about to be written, and the whole of it to be committed by the first rank
    "checkpoint": ("raymoe.training.checkpoint_storage", "TensorWriter.write_data"),
    "commit": ("raymoe.training.checkpoint_folder", "commit"),
    # the trained model is gathered and written
    "save": ("raymoe.training.export", "write_model"),
}
FAMILY = "transformers.models.olmoe.modeling_olmoe"
_VARIABLE = "RAYMOE_TEST_TRAPS"
_FEW_BYTES = 64
_WAIT_S = 30.0


class Traps:
    """Sets traps in a folder, for the workers whose jobs have `env` in their configuration's `env`."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self._folder = folder
        self.env = {_VARIABLE: str(folder)}

    def set(self, point: str, member: int, action: str = "die") -> None:
        """The worker is to fall into it as soon as it comes along."""
        assert point in POINTS, point
        path = self._folder / f"{point}.{member}"
        path.with_suffix(".partial").write_text(action)
        path.with_suffix(".partial").rename(path)

    def is_sprung(self, point: str, member: int) -> bool:
        """Whether somebody fell into it."""
        return not (self._folder / f"{point}.{member}").exists()

    def waits(self, point: str, member: int) -> bool:
        """Whether the worker stands there and waits."""
        return (self._folder / f"{point}.{member}.waits").exists()

    def release(self, point: str, member: int) -> None:
        """Lets it go on."""
        (self._folder / f"{point}.{member}.waits").unlink()


def arm() -> None:
    """Ray calls this first in every worker process: modules that are to be changed are as they are imported."""
    sys.meta_path.insert(0, _Finder())


class Wide:
    """torch, to whom float32 is float64."""

    def __init__(self, torch):
        self._torch = torch
        self.float = self.float32 = torch.float64

    def __getattr__(self, name):
        return getattr(self._torch, name)


class _Finder:
    """Finds the modules that are to be changed as everybody does, and changes what they define."""

    def find_spec(self, name, path=None, target=None):
        points = {point: place for point, (module, place) in POINTS.items() if module == name}
        if not points and name != FAMILY:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def and_change(module):
            execute(module)
            if name == FAMILY:
                module.torch = Wide(module.torch)
            for point, place in points.items():
                *owners, last = place.split(".")
                owner = module
                for each in owners:
                    owner = getattr(owner, each)
                setattr(owner, last, _trapped(point, getattr(owner, last)))

        spec.loader.exec_module = and_change
        return spec


def _trapped(point, function):
    @functools.wraps(function)
    def half_sent(world, sends, receives):
        works = function(world, sends, receives)
        if any(tensor.nbytes > _FEW_BYTES for tensor in sends.values()):
            _look(point)
        return works

    @functools.wraps(function)
    def before(*args, **kwargs):
        _look(point)
        return function(*args, **kwargs)

    return half_sent if point == "snapshot" else before


def _look(point) -> None:
    import ray

    folder, name = os.environ.get(_VARIABLE), ray.get_runtime_context().get_actor_name()
    if folder is None or name is None:
        return
    path = Path(folder) / f"{point}.{name.rpartition('-')[2]}"
    try:
        action = path.read_text()
    except OSError:
        return
    if action == "die":
        path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    waits = Path(f"{path}.waits")
    path.rename(waits)
    until = time.monotonic() + _WAIT_S
    while waits.exists() and time.monotonic() < until:
        time.sleep(0.02)

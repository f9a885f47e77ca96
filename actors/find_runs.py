"""The training runs that are under way in the cluster."""

import ray
from ray.actor import ActorHandle

from raymoe.actors.session import NAMESPACE, actor_names

_CONTROLLER = "/placement-controller"


def find_controllers(run: str | None = None) -> dict[str, ActorHandle]:
    """The controllers of all runs by the runs' names, or that of one.

    Args:
        run: its name, or the beginning of it.

    Raises:
        ValueError: there is no such run.
    """
    names = [name.removesuffix(_CONTROLLER) for name in actor_names() if name.endswith(_CONTROLLER)]
    fitting = sorted(name for name in names if run is None or name.startswith(run))
    if not fitting:
        known = f"; there are {', '.join(sorted(names))}" if names else ""
        raise ValueError(f"no training run {'is under way' if run is None else f'is called {run!r}'}{known}")
    return {name: ray.get_actor(name + _CONTROLLER, NAMESPACE) for name in fitting}

"""Every Ray actor of raymoe. Thin: the work is in the rooms above, which know nothing of Ray."""

from raymoe.lazy import lazy_exports

_HOMES = {
    "CHECKPOINT_FOLDER": "placement_controller",
    "ExpertWorker": "expert_worker",
    "PlacementController": "placement_controller",
    "RunEvent": "elastic_log",
    "StepSummary": "step_summary",
    "WorkerGroup": "worker_group",
    "WorkersFailed": "worker_group",
    "joined_session": "session",
    "ray_session": "session",
}

__all__ = list(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)

"""Every Ray actor of raymoe. Thin: the work is in the rooms above, which know nothing of Ray."""

from raymoe.lazy import lazy_exports

_HOMES = {
    "CHECKPOINT_FOLDER": "placement_controller",
    "ExpertDirectory": "expert_directory",
    "ExpertHost": "expert_host",
    "ExpertWorker": "expert_worker",
    "HostClient": "host_client",
    "PlacementController": "placement_controller",
    "RunEvent": "elastic_log",
    "StepSummary": "step_summary",
    "WorkerGroup": "worker_group",
    "WorkersFailed": "worker_group",
    "joined_session": "session",
    "ray_session": "session",
    "start_directory": "expert_directory",
}

__all__ = list(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)

"""Every Ray actor of raymoe. Thin: the work is in the rooms above, which know nothing of Ray."""

from raymoe.actors.expert_worker import ExpertWorker
from raymoe.actors.placement_controller import PlacementController, StepSummary
from raymoe.actors.session import ray_session
from raymoe.actors.worker_group import WorkerGroup, WorkersFailed

__all__ = ["ExpertWorker", "PlacementController", "StepSummary", "WorkerGroup", "WorkersFailed", "ray_session"]

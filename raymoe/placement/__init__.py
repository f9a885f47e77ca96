"""Pure planning: where experts live, which ones are copied for the next step, and where routed rows go.

Only numpy: no torch, no Ray. Everything is a pure function in whole numbers, so that all ranks plan the same alone.
"""

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.dispatch import DispatchTable, assign, dispatch_rows, locality_first
from raymoe.placement.loads import LOAD_SCALE, predict
from raymoe.placement.materialise import materialise, overlap_degree
from raymoe.placement.plan import LayerPlan, PlacementState, Plan
from raymoe.placement.policy import Policy, policy, policy_names
from raymoe.placement.sharding import check_owners, even_owners

__all__ = [
    "LOAD_SCALE",
    "ClusterSpec",
    "DispatchTable",
    "LayerPlan",
    "PlacementState",
    "Plan",
    "Policy",
    "assign",
    "check_owners",
    "dispatch_rows",
    "even_owners",
    "locality_first",
    "materialise",
    "overlap_degree",
    "policy",
    "policy_names",
    "predict",
]

"""Pure planning: where experts live, which ones are copied for the next step, and where routed rows go.

Only numpy: no torch, no Ray. Everything is a pure function, so that all ranks plan the same alone.
"""

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.cost import LayerCost, layer_cost
from raymoe.placement.dispatch import GLOBAL_DISPATCH, DispatchTable, assign, dispatch_counts
from raymoe.placement.loads import LOAD_SCALE, forecast_error, predict
from raymoe.placement.materialise import materialise, overlap_degree
from raymoe.placement.memory import expert_memory
from raymoe.placement.plan import Base, Dispatch, LayerPlan, Plan, owned
from raymoe.placement.policies import policy, policy_names, trainable_names
from raymoe.placement.policy import Policy
from raymoe.placement.regroup import buddies, owners_after
from raymoe.placement.sharding import check_owners, even_owners, heterogeneous_owners
from raymoe.placement.simulate import Simulation, simulate
from raymoe.placement.state import PlacementState
from raymoe.placement.trace import LoadTrace
from raymoe.placement.workload import Workload

__all__ = [
    "GLOBAL_DISPATCH",
    "LOAD_SCALE",
    "Base",
    "ClusterSpec",
    "Dispatch",
    "DispatchTable",
    "LayerCost",
    "LayerPlan",
    "LoadTrace",
    "PlacementState",
    "Plan",
    "Policy",
    "Simulation",
    "Workload",
    "assign",
    "buddies",
    "check_owners",
    "dispatch_counts",
    "even_owners",
    "expert_memory",
    "forecast_error",
    "heterogeneous_owners",
    "layer_cost",
    "materialise",
    "overlap_degree",
    "owned",
    "owners_after",
    "policy",
    "policy_names",
    "predict",
    "simulate",
    "trainable_names",
]

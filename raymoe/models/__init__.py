"""The seam with transformers: find MoE layers, put a runtime behind their experts, read and write checkpoints by expert.

Importing it registers the experts function "raymoe": `model.set_experts_implementation("raymoe")`.
"""

from raymoe.models.checkpoint import ExpertFiles, load_without_experts
from raymoe.models.experts_function import ExpertsRuntime, attach_runtime, detach_runtime
from raymoe.models.layers import (
    MoELayer,
    expert_parameter_names,
    expert_parameters,
    moe_layers,
    spec_of,
    weights_of,
)
from raymoe.models.layout import ExpertField, ExpertLayout
from raymoe.models.routers import RouterLosses, router_logits, router_losses
from raymoe.models.warm import warm_up_layers
from raymoe.models.writer import CheckpointWriter

__all__ = [
    "CheckpointWriter",
    "ExpertField",
    "ExpertFiles",
    "ExpertLayout",
    "ExpertsRuntime",
    "MoELayer",
    "RouterLosses",
    "attach_runtime",
    "detach_runtime",
    "expert_parameter_names",
    "expert_parameters",
    "load_without_experts",
    "moe_layers",
    "router_logits",
    "router_losses",
    "spec_of",
    "warm_up_layers",
    "weights_of",
]

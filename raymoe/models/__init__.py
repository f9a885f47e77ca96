"""The seam with transformers: find MoE layers, put a runtime behind their experts, read and write checkpoints by expert.

Importing it registers the experts function "raymoe", `model.set_experts_implementation("raymoe")`, and the families
`raymoe_<family>` of models that are no longer their family's.
"""

from raymoe.models.checkpoint import ExpertFiles, load_without_experts
from raymoe.models.experts_function import ExpertsEdit, ExpertsRuntime, attach_runtime, detach_runtime, set_edit
from raymoe.models.families import family_of, open_parts
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
    "ExpertsEdit",
    "ExpertsRuntime",
    "MoELayer",
    "RouterLosses",
    "attach_runtime",
    "detach_runtime",
    "expert_parameter_names",
    "expert_parameters",
    "family_of",
    "load_without_experts",
    "moe_layers",
    "open_parts",
    "router_logits",
    "router_losses",
    "set_edit",
    "spec_of",
    "warm_up_layers",
    "weights_of",
]

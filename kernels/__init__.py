"""Expert computation: plan the rows, run the grouped GEMMs, bring the rows home. Imports torch, and triton when used."""

from raymoe.kernels.backend import Choice, calls
from raymoe.kernels.combine import combine
from raymoe.kernels.expert_rows import expert_rows
from raymoe.kernels.grouped_mm import grouped_mm
from raymoe.kernels.moe_mlp import explain, moe_mlp
from raymoe.kernels.plan import Plan, plan
from raymoe.kernels.quantize import quantize_experts
from raymoe.kernels.spec import ACTIVATIONS, ExpertSpec

__all__ = [
    "ACTIVATIONS",
    "Choice",
    "ExpertSpec",
    "Plan",
    "calls",
    "combine",
    "expert_rows",
    "explain",
    "grouped_mm",
    "moe_mlp",
    "plan",
    "quantize_experts",
]

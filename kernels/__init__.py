"""Expert computation: plan the rows, run the grouped GEMMs, bring the rows home. Imports torch, and triton when used."""

from raymoe.kernels.backend import calls
from raymoe.kernels.combine import combine
from raymoe.kernels.expert_rows import expert_rows
from raymoe.kernels.moe_mlp import moe_mlp
from raymoe.kernels.plan import Plan, plan
from raymoe.kernels.spec import ACTIVATIONS, ExpertSpec

__all__ = ["ACTIVATIONS", "ExpertSpec", "Plan", "calls", "combine", "expert_rows", "moe_mlp", "plan"]

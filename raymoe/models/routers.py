"""What a model's routers say: their logits in every family's output form, and the losses that its configuration asks for.

T tokens, E experts.
"""

from typing import Any, NamedTuple

from torch import Tensor
from transformers import PretrainedConfig

from raymoe.models import switch
from raymoe.models.layers import MoELayer


class RouterLosses(NamedTuple):
    """Weights of the routers' losses beside the cross entropy; 0 where the family has none."""

    balance: float
    """Of the load-balance loss."""
    z: float
    """Of the mean squared log-sum-exp of the logits."""


def router_losses(config: PretrainedConfig) -> RouterLosses:
    """The weights that `config` gives, by the names under which transformers' own forward reads them.

    `router_aux_loss_coef`: mixtral, olmoe, qwen2_moe, qwen3_moe, phimoe, gpt_oss and switch_transformers;
    `router_z_loss_coef`: switch_transformers. deepseek_v2 and deepseek_v3 have neither in transformers (a release's
    `aux_loss_alpha` belongs to a loss per sequence that transformers does not compute).
    """
    text = config.get_text_config()
    balance = getattr(text, "router_aux_loss_coef", None)
    z = getattr(text, "router_z_loss_coef", None)
    return RouterLosses(float(balance or 0.0), float(z or 0.0))


def router_logits(layer: MoELayer, outputs: tuple[Any, ...]) -> Tensor:
    """Logits [T, E] in what a forward hook on `layer.router` is given; they carry the gradient of the router."""
    position = switch.LOGITS_POSITION if switch.is_switch_router(layer.router) else 0
    return outputs[position].flatten(0, -2)

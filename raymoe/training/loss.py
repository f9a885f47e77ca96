"""The training loss: cross entropy over the global batch, and what the model's family adds for its routers.

N tokens, V vocabulary, L MoE layers, E experts.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.models import MoELayer, router_logits

_LEFT_OUT = -100


def token_loss_sum(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Cross entropy in nats, summed over the targets that count, in float32 at the least.

    Args:
        logits: [..., V].
        targets: int64 [...].
        counts: bool [...].
    """
    logits = logits.flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.masked_fill(~counts, _LEFT_OUT).flatten()
    return F.cross_entropy(logits, targets, ignore_index=_LEFT_OUT, reduction="sum")


class RouterLogits:
    """Keeps the router logits of a forward pass; `take()` empties it, and what comes between passes is not kept."""

    def __init__(self, layers: list[MoELayer]):
        self._logits: list[Tensor] = []
        self.is_keeping = True
        self._hooks = [layer.router.register_forward_hook(partial(self._keep, layer)) for layer in layers]

    def take(self) -> list[Tensor]:
        """[N, E] of every layer, in forward order."""
        logits, self._logits = self._logits, []
        return logits

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, layer: MoELayer, _module, _inputs, outputs) -> None:
        if self.is_keeping:
            self._logits.append(router_logits(layer, outputs))


def balance_loss(router_logits: list[Tensor], loads: Tensor, num_positions: int) -> Tensor:
    """This rank's part of the load-balance loss; summed over ranks it is the loss of the global batch.

    Args:
        router_logits: [N, E] of every layer, for this rank's tokens.
        loads: [L, E], routed rows of all ranks' tokens; no gradient flows through them.
        num_positions: (token, layer) pairs of all ranks.

    Returns:
        Scalar: E * sum over experts of (share of tokens that take it) * (mean routing probability), both over all layers;
        K at perfect balance.

    Source: Switch Transformers (arXiv 2101.03961, equations 4 to 6), over all layers together as transformers does.
    """
    logits = torch.cat([layer.flatten(0, -2) for layer in router_logits])
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    share_E = loads.sum(0).to(probabilities) / num_positions
    return loads.shape[1] * (share_E * probabilities.sum(0) / num_positions).sum()


def router_z_loss(router_logits: list[Tensor], num_positions: int) -> Tensor:
    """This rank's part of the mean squared log-sum-exp of router logits, over tokens and layers.

    Args:
        num_positions: (token, layer) pairs of all ranks.

    Source: ST-MoE (arXiv 2202.08906, equation 5).
    """
    logits = torch.cat([layer.flatten(0, -2) for layer in router_logits])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.logsumexp(-1).square().sum() / num_positions

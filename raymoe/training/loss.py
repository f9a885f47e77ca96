"""The training loss: cross entropy over the global batch, and the load-balance loss of the model's family.

N tokens, V vocabulary, L MoE layers, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.models import MoELayer


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats, summed over tokens, in the logits' dtype. logits [..., V], targets int64 [...]."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


class RouterLogits:
    """Keeps the router logits of a forward pass; `take()` empties it."""

    def __init__(self, layers: list[MoELayer]):
        self._logits: list[Tensor] = []
        self._hooks = [layer.router.register_forward_hook(self._keep) for layer in layers]

    def take(self) -> list[Tensor]:
        """[N, E] of every layer, in forward order."""
        logits, self._logits = self._logits, []
        return logits

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, _module, _inputs, outputs) -> None:
        self._logits.append(outputs[0])


def balance_loss(router_logits: list[Tensor], loads: Tensor, num_tokens: int) -> Tensor:
    """This rank's part of the load-balance loss; summed over ranks it is the loss of the global batch.

    Args:
        router_logits: [N, E] of every layer, for this rank's tokens.
        loads: [L, E], routed rows of all ranks' tokens; no gradient flows through them.
        num_tokens: tokens of all ranks.

    Returns:
        Scalar: E * sum over experts of (share of tokens that take it) * (mean routing probability), both over all layers;
        K at perfect balance.

    Source: Switch Transformers (arXiv 2101.03961, equations 4 to 6), over all layers together as transformers does.
    """
    logits = torch.cat([layer.flatten(0, -2) for layer in router_logits])
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    denominator = len(router_logits) * num_tokens
    share_E = loads.sum(0).to(probabilities) / denominator
    return loads.shape[1] * (share_E * probabilities.sum(0) / denominator).sum()

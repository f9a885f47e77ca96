"""Record which experts every token takes, at the call of the experts: behind any router, before any runtime.

T tokens, K choices per token, L MoE layers, E experts.
"""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from raymoe.models import switch
from raymoe.models.layers import moe_layers


class RoutingRecorder:
    """Keeps the experts of every token that passes a model's MoE layers, while it is entered as a context manager.

    The router's word is taken as the experts get it, so group limits, correction biases and replaced routers are in it, and it
    does not matter which experts function computes. The tensors are the router's own: nothing is copied or moved.

    Raises:
        ValueError: the model's family does not follow the experts interface.
    """

    def __init__(self, model: PreTrainedModel):
        self.layers = moe_layers(model)
        self._taken: list[list[Tensor]] = [[] for _ in self.layers]
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "RoutingRecorder":
        for layer, taken in zip(self.layers, self._taken, strict=True):
            self._hooks.append(layer.experts.register_forward_pre_hook(_keep_in(taken)))
        return self

    def __exit__(self, kind, error, trace) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def take(self) -> list[Tensor]:
        """The experts chosen since the last call, and forgets them.

        Returns:
            One int64 [T, K] a layer, tokens in the order in which they came, sequence by sequence; an index of E is no expert.
        """
        chosen = [
            torch.cat(taken) if taken else torch.empty(0, layer.top_k, dtype=torch.int64)
            for layer, taken in zip(self.layers, self._taken, strict=True)
        ]
        for taken in self._taken:
            taken.clear()
        return chosen

    def take_counts(self) -> Tensor:
        """How many tokens chose each expert since the last call; forgets them.

        Returns:
            int64 [L, E], on the CPU.

        Raises:
            ValueError: the layers do not have equally many experts.
        """
        num_experts = sorted({layer.num_experts for layer in self.layers})
        if len(num_experts) > 1:
            raise ValueError(f"layers of {num_experts} experts cannot be counted in one table; use take()")
        counts = [
            torch.bincount(chosen.flatten(), minlength=num_experts[0] + 1)[: num_experts[0]] for chosen in self.take()
        ]
        return torch.stack(counts).cpu()


def _keep_in(taken: list[Tensor]):
    def keep(experts: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        _, expert_index, *_ = arguments
        if switch.is_switch_experts(experts):
            expert_index = switch.chosen_experts(expert_index)
        taken.append(expert_index.detach().flatten(0, -2))

    return keep

"""The runtime behind the model's experts: compute with what the cache hands out, in whatever order it comes.

T tokens, K choices per token, S = T*K routed rows, H hidden size.
"""

from collections.abc import Callable
from contextlib import closing

from torch import Tensor

from raymoe.inference.cache import ExpertCache
from raymoe.kernels import combine, expert_rows, plan
from raymoe.models import MoELayer, weights_of


class CachedExperts:
    """An `ExpertsRuntime`: what `raymoe.models.attach_runtime` takes.

    Each group of experts writes its own rows, and one sum over the choices follows, so the result does not depend on what was
    resident. Called on the thread that generates.
    """

    def __init__(
        self,
        cache: ExpertCache,
        layers: list[MoELayer],
        routed: Callable[[int, Tensor, Tensor, list[int]], None] | None = None,
    ):
        """`routed`: told of each layer's choices while experts are fetched, before they are computed: (layer, hidden [T, H],
        expert_index [T, K], the distinct experts in it)."""
        self._cache = cache
        self._routed = routed
        self._weights = [weights_of(layer, layer.layout.views(cache.pool[:, : layer.layout.numel])) for layer in layers]

    def __call__(self, layer: MoELayer, hidden: Tensor, expert_index: Tensor, expert_weight: Tensor) -> Tensor:
        """(layer, hidden [T, H], expert_index [T, K] int64, expert_weight [T, K]) -> [T, H] in hidden's dtype."""
        routed = plan(expert_index, layer.num_experts)
        # the one host sync of a layer: which experts are wanted decides what is fetched
        wanted = routed.offsets.diff().nonzero().flatten().tolist()
        rows = hidden.new_empty(expert_index.numel(), hidden.shape[1])
        gate_up, down, biases = self._weights[layer.index]
        with closing(self._cache.acquire(layer.index, wanted)) as groups:
            if self._routed is not None:
                self._routed(layer.index, hidden, expert_index, wanted)
            for experts, slots in groups:
                expert_rows(
                    hidden, gate_up, down, routed, experts, slots=slots, out=rows, spec=layer.spec, biases=biases
                )
        return combine(rows, routed, expert_weight)

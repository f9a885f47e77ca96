"""The runtime behind the model's experts: compute with what the cache hands out, in whatever order it comes.

T tokens, K choices per token, S = T*K routed rows, H hidden size.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from raymoe.inference.cache import ExpertCache
from raymoe.inference.expert_form import ExpertForm
from raymoe.inference.route_watch import RouteWatch
from raymoe.inference.sending import Sending
from raymoe.kernels import Plan, combine, expert_rows, plan
from raymoe.models import MoELayer


class CachedExperts:
    """An `ExpertsRuntime`: what `raymoe.models.attach_runtime` takes.

    Each group of experts writes its own rows, and one sum over the choices follows, so the result does not depend on what was
    resident. Called on the thread that generates.
    """

    def __init__(
        self,
        cache: ExpertCache,
        form: ExpertForm,
        routed: Callable[[int, Tensor, Tensor, list[int]], None] | None = None,
        sending: Sending | None = None,
        watch: RouteWatch | None = None,
    ):
        """
        Args:
            form: of the experts in the cache's slots.
            routed: told of each layer's choices while experts are fetched, before they are computed: (layer, hidden [T, H],
                expert_index [T, K], the distinct experts in it).
            sending: has hosts compute the rows of experts that are missing, where it finds that cheaper.
            watch: told of the choices of requests that ask for them.
        """
        self.load = [torch.zeros(count, dtype=torch.int64, device=cache.pool.device) for count in form.num_experts]
        """Rows that each layer's experts have computed so far."""
        self._cache = cache
        self._routed = routed
        self._sending = sending
        self._watch = watch
        self._weights = form.weights(cache.pool)

    def __call__(
        self, layer: MoELayer, hidden: Tensor, expert_index: Tensor, expert_weight: Tensor, **scales: Any
    ) -> Tensor:
        """(layer, hidden [T, H], expert_index [T, K] int64, expert_weight [T, K]) -> [T, H] in hidden's dtype.

        scales: `input_scale` and `hidden_scale` of compressed experts. Rows under them are not sent: hosts know no scales.
        """
        routed = plan(expert_index, layer.num_experts)
        # the one host sync of a layer: which experts are wanted decides what is fetched
        num_rows = routed.offsets.diff()
        wanted = num_rows.nonzero().flatten().tolist()
        self.load[layer.index] += num_rows
        if self._watch is not None:
            self._watch.before(layer.index, wanted)
            self._watch.routed(layer.index, expert_index, layer.num_experts)
        rows = hidden.new_empty(expert_index.numel(), hidden.shape[1])
        sending = None if scales else self._sending
        calls = sending.begin(layer.index, hidden, routed, wanted) if sending is not None else []
        away = {expert for call in calls for expert in call.experts}
        with closing(self._cache.acquire(layer.index, [e for e in wanted if e not in away])) as groups:
            if self._routed is not None:
                self._routed(layer.index, hidden, expert_index, wanted)
            self._compute(layer, hidden, routed, groups, rows, scales)
        if sending is not None and (failed := sending.finish(calls, rows)):
            with closing(self._cache.acquire(layer.index, failed)) as groups:
                self._compute(layer, hidden, routed, groups, rows, scales)
        return combine(rows, routed, expert_weight)

    def _compute(
        self,
        layer: MoELayer,
        hidden: Tensor,
        routed: Plan,
        groups: Iterable[tuple[list[int], list[int]]],
        out: Tensor,
        extra: dict[str, Any],
    ) -> None:
        gate_up, down, biases, scales = self._weights[layer.index]
        for experts, slots in groups:
            expert_rows(
                hidden,
                gate_up,
                down,
                routed,
                experts,
                slots=slots,
                out=out,
                spec=layer.spec,
                biases=biases,
                scales=scales,
                **extra,
            )

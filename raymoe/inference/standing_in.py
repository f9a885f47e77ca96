"""On a miss: the trained vectors of an expert act in its place (compressed experts), but the strongest is always waited for.

T tokens, M main experts of a token, E experts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.compression.attach import is_compressed, state_of, theta_parameters
from raymoe.compression.edits import LayerEdit
from raymoe.compression.split import Split
from raymoe.inference.cache import ExpertCache
from raymoe.inference.route_watch import RouteWatch


class StandingIn:
    """Puts the cache behind a compressed model's choice of main experts. Used on the thread that generates.

    Outputs then depend on what was resident: nobody gets this who has not asked for it.
    """

    def __init__(self, model: PreTrainedModel, cache: ExpertCache, watch: RouteWatch):
        """
        Raises:
            ValueError: the model has no trained vectors for its experts.
        """
        refuse_untrained(model)
        self._cache = cache
        self._watch = watch
        self.names: Sequence[str] = ()
        """Of the request that each row of this step belongs to."""
        self.rows = 0
        """Main rows that vectors stood in for."""
        self.by_rank: Counter[int] = Counter()
        """Of those, by the rank that their expert had."""
        self._by_request: Counter[str] = Counter()
        self._main_index: Tensor | None = None
        for edit in state_of(model).edits.values():
            edit.absent, edit.demotions = self._absent_of(edit), self._note

    def taken(self, request: str) -> int:
        """Rows of a request that vectors stood in for; forgotten with this call."""
        return self._by_request.pop(request, 0)

    def facts(self) -> dict[str, Any]:
        """Plain values for statistics."""
        return {"rows": self.rows, "by_rank": dict(sorted(self.by_rank.items()))}

    def _absent_of(self, edit: LayerEdit):
        layer = edit.layer

        def absent(parts: Split) -> Tensor | None:
            wanted = parts.main_index.unique().tolist()
            # who is somebody's strongest is fetched anyway
            strongest = set(parts.main_index[:, 0].unique().tolist())
            gone = self._cache.absent(layer.index, [e for e in wanted if e < layer.num_experts and e not in strongest])
            if not gone:
                return None
            self._main_index = parts.main_index
            found = torch.zeros(layer.num_experts, dtype=torch.bool)
            found[gone] = True
            return found.to(parts.main_index.device)

        return absent

    def _note(self, is_gone: Tensor) -> None:
        assert self._main_index is not None, "comes after `absent`, in the same layer"
        self._watch.stands_in(self._main_index, is_gone)
        token, rank = (x.tolist() for x in is_gone.nonzero(as_tuple=True))
        self.rows += len(rank)
        self.by_rank.update(rank)
        self._by_request.update(self.names[int(row)] for row in token if row < len(self.names))


def refuse_untrained(model: PreTrainedModel) -> None:
    """Raises ValueError where a model has no trained vectors."""
    vectors = theta_parameters(model) if is_compressed(model) else {}
    if not vectors or state_of(model).settings.method != "compressed_experts":
        raise ValueError(
            "on_miss: 'compressed' needs a model with compressed experts; make one with raymoe compress, or set on_miss: wait"
        )
    if all(bool((p == 1).all()) for p in vectors.values()):
        raise ValueError(
            "on_miss: 'compressed' needs trained vectors, and this model's are all ones; raymoe compress fits them"
        )

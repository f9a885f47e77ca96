"""How good predictions turn out to be, counted online, and how several predictors' answers become one.

E experts.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_EDGE = 1e-4


@dataclass
class QualityCounts:
    """What became of predictions; an expert counts as predicted from the threshold on. Visits without a prediction count too."""

    visits: int = 0
    predicted: int = 0
    wanted: int = 0
    hits: int = 0
    """Predicted and wanted."""
    wanted_bytes: int = 0
    hit_bytes: int = 0
    wasted_bytes: int = 0
    """Of experts that were predicted and not wanted: what fetching all that was predicted would have wasted."""

    @property
    def precision(self) -> float:
        """Of the predicted, the share that was wanted; 0 where nothing was predicted."""
        return self.hits / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Of the wanted, the share that was predicted."""
        return self.hits / self.wanted if self.wanted else 0.0

    @property
    def byte_recall(self) -> float:
        """Of the wanted bytes, the share that was predicted."""
        return self.hit_bytes / self.wanted_bytes if self.wanted_bytes else 0.0

    def add(self, other: "QualityCounts", sign: int = 1) -> None:
        """Adds another's counts, or takes them away again."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + sign * value)


class Quality:
    """Of one predictor. Counts a layer's visit when its truth is known, against the last prediction that was made for it.

    Works on the CPU; `total` has everything, `window` the last visits.
    """

    def __init__(self, expert_bytes: Sequence[int], *, threshold: float = 0.5, window_visits: int = 4096):
        """`expert_bytes`: of an expert of each layer; `threshold`: the probability from which an expert counts as predicted;
        `window_visits`: layer visits that the window holds.

        Raises:
            ValueError: a threshold outside (0, 1], or an empty window.
        """
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"threshold = {threshold}: must be above 0 and at most 1")
        if window_visits < 1:
            raise ValueError(f"window_visits = {window_visits}: must be at least 1")
        self.total = QualityCounts()
        self.window = QualityCounts()
        self._expert_bytes, self._threshold, self._window_visits = list(expert_bytes), threshold, window_visits
        self._visits: deque[QualityCounts] = deque()
        self._pending: dict[int, Tensor] = {}

    def predicted(self, predictions: Mapping[int, Tensor]) -> None:
        """{layer: probability [E]}: what the predictor said; later words replace earlier ones."""
        self._pending.update(predictions)

    def settled(self, layer: int, wanted: Tensor) -> None:
        """A layer's router has decided: `wanted` bool [E], what at least one token chose."""
        probability = self._pending.pop(layer, None)
        named = torch.zeros_like(wanted) if probability is None else probability.to(wanted.device) >= self._threshold
        each = self._expert_bytes[layer]
        num_named, num_wanted, hits = torch.stack([named.sum(), wanted.sum(), (named & wanted).sum()]).tolist()
        visit = QualityCounts(1, num_named, num_wanted, hits, num_wanted * each, hits * each, (num_named - hits) * each)
        self.total.add(visit)
        self.window.add(visit)
        self._visits.append(visit)
        if len(self._visits) > self._window_visits:
            self.window.add(self._visits.popleft(), -1)

    @property
    def weight(self) -> float:
        """For `combine`: the window's precision, drawn towards one half while little was predicted."""
        return (self.window.hits + 4) / (self.window.predicted + 8)


def combine(predictions: Sequence[Mapping[int, Tensor]], weights: Sequence[float]) -> dict[int, Tensor]:
    """Merges predictors' answers: per layer the mean of their log-odds, weighted among those that answered for it (a logarithmic
    opinion pool: Genest and Zidek, Statistical Science 1986), so that who is sure outvotes who is not.

    Args:
        predictions: {layer: float32 [E] in [0, 1]} of each predictor.
        weights: of each, at least 0, for example `Quality.weight`; 0 leaves a predictor out.

    Raises:
        ValueError: not as many weights as predictors, or one that is negative or no number.
    """
    if len(predictions) != len(weights):
        raise ValueError(f"{len(predictions)} predictions, but {len(weights)} weights: give one each")
    for i, weight in enumerate(weights):
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"weights[{i}] = {weight}: must be a number of at least 0")
    heard = [(answer, weight) for answer, weight in zip(predictions, weights, strict=True) if weight > 0]
    merged = {}
    for layer in dict.fromkeys(layer for answer, _ in heard for layer in answer):
        parts = [(answer[layer], weight) for answer, weight in heard if layer in answer]
        if len(parts) == 1:
            merged[layer] = parts[0][0]
            continue
        device = parts[0][0].device
        odds = sum(torch.logit(part.to(device), _EDGE) * weight for part, weight in parts)
        assert isinstance(odds, Tensor)
        merged[layer] = torch.sigmoid(odds / sum(weight for _, weight in parts))
    return merged

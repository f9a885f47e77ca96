"""What a compression is: its method, and how many of a token's experts run in full."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Keep = int | float
"""An int is a number of experts; a float is a share of what the token was given, rounded up, so 1.0 is all of them."""

METHODS = {
    "compressed_experts": "learnt vectors, three an expert (two with tie_input), summed over a token's other experts",
    "shared_vector": "learnt vectors too, but one set a layer: what is gained without knowing which experts were left out",
    "drop": "the other experts do nothing",
    "drop_renormalised": "as drop, and the main experts' weights make up for what is lost",
    "mean_vector": "each other expert answers its mean output (MoNE, arXiv 2507.00390), without training",
    "magnitude": "experts with the smallest weights are pruned for every token, the others' weights make up for them",
    "reap": "as magnitude, by the mean of gate times norm of the output over text (REAP, arXiv 2510.13999)",
}
ROUNDING = 1e-9
"""A share times a count may come out above the whole number that is meant."""
LEARNT = ("compressed_experts", "shared_vector")
PRUNES = ("magnitude", "reap")
CALIBRATED = ("mean_vector", "reap")


@dataclass(frozen=True)
class CompressionSettings:
    """What stands in a compressed model's `config.json`.

    Raises:
        ValueError: an unknown method, or a keep that leaves no expert; names the key.
    """

    method: str
    keep: tuple[Keep, ...]
    """For each MoE layer."""
    tie_input: bool = False
    """Gate and up read rows under one vector, which leaves them one product."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} is not known; use one of {', '.join(METHODS)}")
        for keep in self.keep:
            _check(keep)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self) | {"keep": list(self.keep)}

    @staticmethod
    def from_dict(given: dict[str, Any]) -> CompressionSettings:
        """The inverse of `to_dict`."""
        return CompressionSettings(given["method"], tuple(given["keep"]), given["tie_input"])


def keep_by_layer(keep: Keep | Sequence[Keep], top_k: Sequence[int]) -> tuple[Keep, ...]:
    """`keep` for each layer, checked against what its tokens take.

    Raises:
        ValueError: not one for each layer, 0 or less, a share above 1, or more experts than a token takes.
    """
    each = tuple(keep) if isinstance(keep, Sequence) else (keep,) * len(top_k)
    if len(each) != len(top_k):
        raise ValueError(f"keep: got {len(each)} values for {len(top_k)} MoE layers; give one, or one for each layer")
    for value, taken in zip(each, top_k, strict=True):
        _check(value)
        if isinstance(value, int) and value > taken:
            raise ValueError(
                f"keep: {value} experts of {taken} that a token takes; use 1 to {taken}, or a share such as 0.5"
            )
    return each


def parse_keep(text: str) -> Keep | list[Keep]:
    """ "0.5", "4", or one for each layer, comma-separated: "4,4,2".

    Raises:
        ValueError: not numbers.
    """
    try:
        values: list[Keep] = [int(part) if part.strip().isdigit() else float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"keep: {text!r} is no number; give a share (0.5), a number of experts (4), or one for each layer") \
            from None  # fmt: skip
    return values[0] if len(values) == 1 else values


def main_experts(keep: Keep, taken: int) -> int:
    """How many of `taken` experts run in full."""
    return min(keep, taken) if isinstance(keep, int) else math.ceil(keep * taken - ROUNDING)


def _check(keep: Any) -> None:
    is_number = isinstance(keep, int | float) and not isinstance(keep, bool)
    if not is_number or not keep > 0 or (isinstance(keep, float) and keep > 1):
        raise ValueError(f"keep: got {keep!r}; use a share in (0, 1] or a number of experts from 1 on")

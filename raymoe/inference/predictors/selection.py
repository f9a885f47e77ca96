"""Predictors by name."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from raymoe.inference.predictors.base import Predictor
from raymoe.inference.predictors.look_ahead import GateLookAhead
from raymoe.inference.predictors.path_predictor import PathPredictor
from raymoe.inference.predictors.token_table import TokenTable
from raymoe.inference.predictors.transitions import TransitionTable
from raymoe.models import MoELayer

_DEPTH = 2
"""MoE layers that are looked ahead: enough for a read to end in time, and each costs a router."""

NAMES = ("look_ahead", "token_table", "transitions", "path")


def predictors_by_name(
    names: Iterable[str], model: Path, layers: Sequence[MoELayer], *, vocab_size: int
) -> list[Predictor]:
    """Makes those of `NAMES`; "path" only where `raymoe predictor train` has left one beside the checkpoint.

    Raises:
        ValueError: an unknown name, or a stored predictor that is damaged or of another model.
    """
    most_experts, top_k = max(layer.num_experts for layer in layers), max(layer.top_k for layer in layers)
    made: list[Predictor] = []
    for name in dict.fromkeys(names):
        match name:
            case "look_ahead":
                made.append(GateLookAhead(layers, depth=_DEPTH))
            case "token_table":
                made.append(TokenTable(len(layers), most_experts))
            case "transitions":
                made.append(TransitionTable(len(layers), most_experts))
            case "path":
                stored = PathPredictor.beside(
                    model, num_layers=len(layers), num_experts=most_experts, top_k=top_k, vocab_size=vocab_size
                )
                made += [stored] if stored is not None else []
            case _:
                raise ValueError(f"predictors: unknown name {name!r}; known are {', '.join(NAMES)}")
    return made

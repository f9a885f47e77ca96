"""Synthetic routing: traces whose skew, drift, bursts and differences between ranks are set, and presets near measured ones.

S = steps, R = ranks, L = MoE layers, E = experts, T = tokens a rank takes through a layer, K = experts a token takes.

Popularity is drawn once a layer; its logarithm drifts as a first-order autoregressive process and jumps in bursts; each rank's own
differs a little, anew in every step. Rows are then drawn token by token, so a trace has sampling noise as a real one has.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from numbers import Integral

import numpy as np

from raymoe.placement.trace import LoadTrace

_BASE, _STEP, _BURST = range(3)
_GRID = 1 << 32
_LEAST_SHARE = 1e-30


@dataclass(frozen=True)
class LoadSpec:
    """How the popularity of experts looks and moves; the default is all experts alike, for ever.

    Raises:
        ValueError: a number out of range; names the field.
    """

    zipf: float = 0.0
    """The expert in place n is wanted in proportion to ``n ** -zipf``; which expert has which place is drawn a layer."""

    dirichlet: float | None = None
    """Each expert's popularity is further multiplied by a draw from Gamma(dirichlet): with ``zipf`` 0 that is a symmetric
    Dirichlet distribution, the smaller the more skewed. None: no such draw."""

    drift_rho: float = 0.0
    """How much of a step's deviation from the base log popularity is left in the next, in [0, 1)."""

    drift_sigma: float = 0.0
    """Standard deviation of what is added to each log popularity a step."""

    burst_probability: float = 0.0
    """Probability, a step and layer, that a burst begins at one expert, whichever."""

    burst_size: float = 1.0
    """What the expert's popularity is multiplied with while its burst lasts, at least 1."""

    burst_steps: int = 1
    """How many steps a burst lasts."""

    rank_noise: float = 0.0
    """Standard deviation between a rank's log popularities and those of all; drawn anew each step."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} = {value!r}: must be a number of at least 0")
        for name, is_good, rule in (
            ("dirichlet", self.dirichlet != 0, "must be above 0, or None"),
            ("drift_rho", self.drift_rho < 1, "must be below 1, or popularity wanders off"),
            ("burst_probability", self.burst_probability <= 1, "a probability is at most 1"),
            ("burst_size", self.burst_size >= 1, "must be at least 1"),
            (
                "burst_steps",
                isinstance(self.burst_steps, Integral) and self.burst_steps >= 1,
                "must be a whole number from 1",
            ),
        ):
            if not is_good:
                raise ValueError(f"{name} = {getattr(self, name)!r}: {rule}")


_SMARTMOE = LoadSpec(zipf=0.7, dirichlet=0.17, drift_rho=0.975, drift_sigma=0.066, rank_noise=0.05)
_MODERN = LoadSpec(dirichlet=10.0, drift_rho=0.975, drift_sigma=0.05, rank_noise=0.05)

PRESETS = {
    "smartmoe": _SMARTMOE,
    "modern": _MODERN,
    "balanced": LoadSpec(),
    "zipf": LoadSpec(zipf=1.0),
    "bursts": replace(_MODERN, burst_probability=0.1, burst_size=16.0, burst_steps=3),
    "early": replace(_SMARTMOE, drift_rho=0.5, drift_sigma=0.9, rank_noise=0.1),
}
"""Popularity by name. Fitted by hand, so that ``trace_statistics`` of what they give comes near to

- ``smartmoe``, at 16 ranks x 32 experts, top-2: the routing counts in the artifact of SmartMoE (USENIX ATC'23): the busiest
  expert takes 0.35 of the rows, four take 0.73; Gini 0.80; 28 % of the cells empty; busiest device / mean 6.0 with plain expert
  parallelism; rank distance 0.019; drift (after 1000 iterations, between samples 1, 10 and 100 apart) 0.022, 0.06 and 0.13;
- ``early``: its first 100 iterations: drift 0.31, busiest device / mean 6.6 (but fewer empty cells than there);
- ``modern``, at 32 ranks x 64 experts: busiest device / mean 1.7, as the artifact of LAER-MoE (arXiv 2602.11686) has it on
  32 GPUs with plain expert parallelism; its drift is our assumption;
- ``bursts``: ``modern`` where now and then an expert is wanted 16 times as much for 3 steps.

``zipf`` (exponent 1) and ``balanced`` do not move: successive steps differ by chance alone.
"""


def generate(
    spec: str | LoadSpec,
    *,
    steps: int,
    ranks: int,
    layers: int,
    experts: int,
    tokens_per_rank: int,
    choices: int,
    seed: int,
) -> LoadTrace:
    """A trace of that popularity: each (step, rank, layer) has ``tokens_per_rank * choices`` rows, as each token takes
    ``choices`` distinct experts.

    A function of the arguments alone (with one version of NumPy). More steps leave the earlier ones as they were.

    Args:
        spec: a name in ``PRESETS``, or one's own.
        seed: not negative.

    Raises:
        ValueError: an unknown preset, a size below 1, a negative seed, or more choices than experts.
    """
    name, spec = (spec, _preset(spec)) if isinstance(spec, str) else ("synthetic", spec)
    check_sizes(steps, ranks, layers, experts, tokens_per_rank, choices, seed)
    base_LE = _base(spec, layers, experts, np.random.default_rng([seed, _BASE]))
    bursts_SLE = _bursts(spec, steps, layers, experts, seed)
    tokens_R = np.full(ranks, tokens_per_rank)
    rows = np.empty((steps, ranks, layers, experts), dtype=np.int64)
    drift_LE = np.zeros_like(base_LE)
    for step in range(steps):
        rng = np.random.default_rng([seed, _STEP, step])
        # the first step is drawn from where the process settles
        scale = spec.drift_sigma if step else spec.drift_sigma / np.sqrt(1 - spec.drift_rho**2)
        drift_LE = spec.drift_rho * drift_LE + scale * rng.standard_normal(base_LE.shape)
        own_RLE = spec.rank_noise * rng.standard_normal((ranks, layers, experts))
        log_RLE = base_LE + drift_LE + bursts_SLE[step] + own_RLE
        # none may fall to 0: a token might then not find enough experts
        popularity_RLE = np.maximum(np.exp(log_RLE - log_RLE.max(axis=2, keepdims=True)), _LEAST_SHARE)
        rows[step] = routed_rows(popularity_RLE, tokens_R, choices, rng)
    return LoadTrace(rows, name, choices)


def routed_rows(popularity: np.ndarray, tokens: np.ndarray, choices: int, rng: np.random.Generator) -> np.ndarray:
    """Rows that each expert gets when every token takes ``choices`` distinct experts, drawn by popularity.

    An expert is in a token's choice with probability ``choices * share``; where that would be above 1, every token takes it,
    and the others' shares grow. Expert e gets at most as many rows as there are tokens.

    Args:
        popularity: float [R, L, E], not negative; at least ``choices`` experts of a layer above 0.
        tokens: int [R], tokens of each rank; 0 is allowed.

    Returns:
        int64 [R, L, E]; ``[r, l]`` sums to ``tokens[r] * choices``.

    Source: systematic sampling (Madow 1949), one random start a token: the inclusion probabilities hold exactly.
    """
    end = _ends(_inclusion(popularity, choices), choices)
    whole, part = np.divmod(end, _GRID)
    # of T uniform starts, how many lie below each end's fraction: the gaps between the fractions get multinomial counts
    order = np.argsort(part, axis=-1, kind="stable")
    ordered = np.take_along_axis(part, order, axis=-1)
    gaps = np.diff(ordered, axis=-1, append=_GRID)
    inside = rng.multinomial(np.broadcast_to(tokens[:, None], popularity.shape[:2]), gaps / _GRID)
    below = np.empty_like(inside)
    np.put_along_axis(below, order, np.cumsum(inside, axis=-1) - inside, axis=-1)
    return np.diff(whole * tokens[:, None, None] + below, axis=-1)


def check_sizes(
    steps: int, ranks: int, layers: int, experts: int, tokens_per_rank: int, choices: int, seed: int
) -> None:
    """Raises ValueError for a size below 1, a negative seed or more choices than experts."""
    sizes = {"steps": steps, "ranks": ranks, "layers": layers, "experts": experts}
    for name, size in (sizes | {"tokens_per_rank": tokens_per_rank, "choices": choices}).items():
        if size < 1:
            raise ValueError(f"{name} = {size}: must be at least 1")
    if choices > experts:
        raise ValueError(f"choices = {choices}: a token takes distinct experts, and there are only {experts}")
    if seed < 0:
        raise ValueError(f"seed = {seed}: must not be negative")


def _preset(name: str) -> LoadSpec:
    if name not in PRESETS:
        raise ValueError(f"no load preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]


def _base(spec: LoadSpec, layers: int, experts: int, rng: np.random.Generator) -> np.ndarray:
    place_LE = rng.permuted(np.tile(np.arange(1, experts + 1), (layers, 1)), axis=1)
    log_LE = -spec.zipf * np.log(place_LE)
    if spec.dirichlet is not None:
        log_LE += np.log(np.maximum(rng.gamma(spec.dirichlet, size=log_LE.shape), _LEAST_SHARE))
    return log_LE


def _bursts(spec: LoadSpec, steps: int, layers: int, experts: int, seed: int) -> np.ndarray:
    """What bursts add to log popularity, float64 [S, L, E]; two at one expert add up."""
    added = np.zeros((steps, layers, experts))
    if spec.burst_probability == 0 or spec.burst_size == 1:
        return added
    for step in range(steps):
        rng = np.random.default_rng([seed, _BURST, step])
        begins_L, expert_L = rng.random(layers) < spec.burst_probability, rng.integers(experts, size=layers)
        layer = np.flatnonzero(begins_L)
        added[step : step + spec.burst_steps, layer, expert_L[layer]] += np.log(spec.burst_size)
    return added


def _inclusion(popularity: np.ndarray, choices: int) -> np.ndarray:
    """Probability that an expert is among a token's choices: in proportion to popularity, at most 1, summing to K."""
    chance = choices * popularity / popularity.sum(axis=-1, keepdims=True)
    # each turn fixes at least one expert more at 1, and K of them at 1 are all there is to give
    for _ in range(choices):
        full = chance >= 1
        if not (chance > 1).any():
            break
        rest = np.where(full, 0.0, popularity)
        total = rest.sum(axis=-1, keepdims=True)
        left = choices - full.sum(axis=-1, keepdims=True)
        chance = np.where(full, 1.0, left * rest / np.where(total > 0, total, 1.0))
    return chance


def _ends(chance: np.ndarray, choices: int) -> np.ndarray:
    """Running sums of the chances in steps of 1/``_GRID``, int64 [..., E + 1], from 0 to K, no chance above 1.

    In whole numbers, as a rounding error in one of them could give an expert more rows than there are tokens.
    """
    num_experts = chance.shape[-1]
    end = np.zeros((*chance.shape[:-1], num_experts + 1), dtype=np.int64)
    total = np.cumsum(chance, axis=-1)
    # all but a rounding error is all: what is left must not go to experts that nobody wants
    end[..., 1:] = np.where(total > choices * (1 - 1e-9), choices * _GRID, np.rint(total * _GRID))
    end[..., -1] = choices * _GRID
    slope = np.arange(num_experts + 1) * _GRID
    end = np.maximum(end, slope - slope[-1] + choices * _GRID)
    return np.minimum.accumulate(end - slope, axis=-1) + slope

"""Metrics: every name, unit and meaning is declared here, once, without Ray.

Values are kept in this process, where tests and reports read them with ``snapshot()``; an exporter that ``actors/`` plugs in
passes them on. Names carry their unit and tags are few: every actor makes its own series of each.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["counter", "gauge", "histogram"]
_LEGAL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


@dataclass(frozen=True)
class Metric:
    """One time series, or one a combination of tag values.

    Raises:
        ValueError: a name or tag that Prometheus does not take, an unknown kind, or buckets that do not fit the kind.
    """

    name: str

    kind: Kind
    """counter: only grows; gauge: the present value; histogram: one observation at a time."""

    help: str
    """What it means, in one sentence."""

    tags: tuple[str, ...] = ()
    """Names of the labels; every recorded value gives each of them."""

    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, ascending, in the unit of the name."""

    def __post_init__(self) -> None:
        for name in (self.name, *self.tags):
            if not _LEGAL_NAME.fullmatch(name):
                raise ValueError(
                    f"metric {self.name!r}: {name!r} must be letters, digits and _, not starting with a digit"
                )
        if self.kind not in get_args(Kind):
            raise ValueError(f"metric {self.name}: kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if (self.kind == "histogram") != bool(self.buckets) or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(
                f"metric {self.name}: a histogram, and only that, needs ascending buckets, got {self.buckets}"
            )

    def inc(self, value: float = 1, **tags: str) -> None:
        """Adds to a counter.

        Raises:
            ValueError: another kind, a negative value, or tags other than the declared ones.
        """
        if value < 0:
            raise ValueError(f"{self.name}.inc({value}): a counter only grows")
        self._record("counter", value, tags)

    def set(self, value: float, **tags: str) -> None:
        """Sets a gauge. Raises ValueError for another kind or other tags."""
        self._record("gauge", value, tags)

    def observe(self, value: float, **tags: str) -> None:
        """Adds one observation to a histogram. Raises ValueError for another kind or other tags."""
        self._record("histogram", value, tags)

    def _record(self, kind: Kind, value: float, tags: dict[str, str]) -> None:
        if kind != self.kind:
            verb = {"counter": "inc", "gauge": "set", "histogram": "observe"}[self.kind]
            raise ValueError(f"{self.name} is a {self.kind}: use {verb}()")
        if set(tags) != set(self.tags):
            raise ValueError(f"{self.name} takes the tags {list(self.tags)}, got {sorted(tags)}")
        _store.record(self, float(value), tags)


Exporter = Callable[[Metric, float, dict[str, str]], None]
"""Gets the metric, the value as it was recorded (for a counter, the increment) and the tags."""


class _Store:
    """The values of this process, and where they go from here."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: dict[str, float] = {}
        self.exporter: Exporter | None = None

    def record(self, metric: Metric, value: float, tags: dict[str, str]) -> None:
        labels = ",".join(f'{tag}="{tags[tag]}"' for tag in metric.tags)
        labels = f"{{{labels}}}" if labels else ""
        with self.lock:
            if metric.kind == "gauge":
                self.values[metric.name + labels] = value
            elif metric.kind == "counter":
                self._add(metric.name + labels, value)
            else:
                self._add(f"{metric.name}_count{labels}", 1)
                self._add(f"{metric.name}_sum{labels}", value)
            exporter = self.exporter
        # outside the lock: an exporter may take its time, or record a metric of its own
        if exporter is not None:
            exporter(metric, value, tags)

    def _add(self, key: str, value: float) -> None:
        self.values[key] = self.values.get(key, 0.0) + value


_store = _Store()


def set_exporter(exporter: Exporter | None) -> None:
    """Passes every value recorded from now on to ``exporter`` as well; None ends that."""
    with _store.lock:
        _store.exporter = exporter


def snapshot() -> dict[str, float]:
    """What this process has recorded, keyed as Prometheus writes it.

    A gauge is its last value and a counter its total; a histogram has ``_count`` and ``_sum``. Tags stand in braces:
    ``raymoe_serve_requests_total{status="ok"}``.
    """
    with _store.lock:
        return dict(_store.values)


def reset() -> None:
    """Forgets all values of this process; the exporter stays."""
    with _store.lock:
        _store.values.clear()


TRAIN_STEP_S = Metric(
    "raymoe_train_step_s",
    kind="histogram",
    help="Seconds a training step takes, from its batch to the updated parameters.",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
TRAIN_LOSS = Metric("raymoe_train_loss", kind="gauge", help="Mean cross-entropy of the last step, in nats per token.")
TRAIN_TOKENS_TOTAL = Metric(
    "raymoe_train_tokens_total", kind="counter", help="Tokens trained on, over all workers together."
)
TRAIN_TOKENS_PER_S = Metric(
    "raymoe_train_tokens_per_s", kind="gauge", help="Tokens per second of the last step, over all workers together."
)
TRAIN_EXPERT_IMBALANCE_RATIO = Metric(
    "raymoe_train_expert_imbalance_ratio",
    kind="gauge",
    help="Busiest worker's routed rows over the mean worker's, averaged over the MoE layers; 1 is perfectly even.",
)
TRAIN_MATERIALISED_BYTES_TOTAL = Metric(
    "raymoe_train_materialised_bytes_total",
    kind="counter",
    help="Bytes of expert parameters sent to copies and of their gradients sent back.",
)
TRAIN_ALLTOALL_BYTES_TOTAL = Metric(
    "raymoe_train_alltoall_bytes_total", kind="counter", help="Bytes of token rows sent to other workers and back."
)
TRAIN_EVENTS_TOTAL = Metric(
    "raymoe_train_events_total",
    kind="counter",
    help="What happened to the run besides steps: death, rollback, join, leave, waiting, fallback, controller.",
    tags=("kind",),
)
TRAIN_WORKERS = Metric("raymoe_train_workers", kind="gauge", help="Workers of the epoch in force.")
SERVE_REQUESTS_TOTAL = Metric(
    "raymoe_serve_requests_total", kind="counter", help="Requests answered, by how they ended.", tags=("status",)
)
SERVE_TOKENS_TOTAL = Metric(
    "raymoe_serve_tokens_total", kind="counter", help="Tokens processed: kind is prompt or generated.", tags=("kind",)
)
SERVE_TTFT_S = Metric(
    "raymoe_serve_ttft_s",
    kind="histogram",
    help="Seconds from a request's arrival to its first token.",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
SERVE_TOKENS_PER_S = Metric(
    "raymoe_serve_tokens_per_s", kind="gauge", help="Tokens generated per second, over all running requests."
)
SERVE_EXPERT_HITS_TOTAL = Metric(
    "raymoe_serve_expert_hits_total", kind="counter", help="Experts that a layer wanted and found in the cache."
)
SERVE_EXPERT_MISSES_TOTAL = Metric(
    "raymoe_serve_expert_misses_total", kind="counter", help="Experts that a layer wanted and had to wait for."
)
SERVE_EXPERT_FETCHED_BYTES_TOTAL = Metric(
    "raymoe_serve_expert_fetched_bytes_total", kind="counter", help="Bytes of experts fetched into the cache."
)
SERVE_EXPERT_PREFETCHED_TOTAL = Metric(
    "raymoe_serve_expert_prefetched_total", kind="counter", help="Experts fetched before anybody wanted them."
)
SERVE_EXPERT_WASTED_BYTES_TOTAL = Metric(
    "raymoe_serve_expert_wasted_bytes_total", kind="counter", help="Bytes of those that nobody wanted before they went."
)
SERVE_EXPERT_STALL_S_TOTAL = Metric(
    "raymoe_serve_expert_stall_s_total", kind="counter", help="Seconds that the computation waited for experts."
)
SERVE_PREDICTOR_ON = Metric(
    "raymoe_serve_predictor_on",
    kind="gauge",
    help="1 while what a predictor says pays and is heeded, else 0; predictor 'all': whether predictions move anything.",
    tags=("predictor",),
)
SERVE_PREDICTOR_PRECISION = Metric(
    "raymoe_serve_predictor_precision",
    kind="gauge",
    help="Share of the experts a predictor named that were wanted, of late.",
    tags=("predictor",),
)
SERVE_PREDICTOR_RECALL = Metric(
    "raymoe_serve_predictor_recall",
    kind="gauge",
    help="Share of the wanted experts that a predictor had named, of late.",
    tags=("predictor",),
)
SERVE_RESIDENT_EXPERTS = Metric(
    "raymoe_serve_resident_experts", kind="gauge", help="Experts in the cache, over all layers."
)

METRICS: tuple[Metric, ...] = tuple(value for value in globals().copy().values() if isinstance(value, Metric))
"""All metrics there are, in the order of their declaration."""

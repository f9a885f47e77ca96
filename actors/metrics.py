"""Plugs Ray's metrics into `raymoe.telemetry`, so that what an actor records shows in the dashboard and in Prometheus."""

import threading

from ray.util import metrics as ray_metrics

from raymoe.telemetry import Metric, set_exporter

_KINDS = {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge, "histogram": ray_metrics.Histogram}


def export_metrics() -> None:
    """From now on every value that this process records goes to Ray as well. Call it in an actor's constructor."""
    series: dict[str, ray_metrics.Metric] = {}
    lock = threading.Lock()

    def export(metric: Metric, value: float, tags: dict[str, str]) -> None:
        with lock:
            if metric.name not in series:
                buckets = {"boundaries": list(metric.buckets)} if metric.kind == "histogram" else {}
                series[metric.name] = _KINDS[metric.kind](metric.name, metric.help, tag_keys=metric.tags, **buckets)
        ours = series[metric.name]
        record = {"counter": "inc", "gauge": "set", "histogram": "observe"}[metric.kind]
        if metric.kind == "counter" and value == 0:
            return  # Ray refuses an increment of nothing
        getattr(ours, record)(value, tags=tags)

    set_exporter(export)

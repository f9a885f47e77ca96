"""What raymoe says about itself: metrics, routing traces, results as JSON, and reports with plots.

No torch and no Ray: ``actors/`` plugs the exporter in. Reports are loaded when they are first asked for: an actor that records
metrics needs no matplotlib.
"""

from raymoe.lazy import lazy_exports
from raymoe.telemetry.metrics import METRICS, Exporter, Metric, set_exporter, snapshot
from raymoe.telemetry.results import run_meta, write_json
from raymoe.telemetry.trace import TRACE_VERSION, TraceWriter, trace_schema
from raymoe.telemetry.trace_files import load_counts, read_trace

_PARTS = ("Answer", "Event", "Number", "Report", "Score", "Serving", "Table", "Timeline", "Training")
_HOMES = dict.fromkeys(_PARTS, "parts")
_HOMES |= {"write_report": "report"}

__all__ = [
    *_HOMES,
    "METRICS",
    "TRACE_VERSION",
    "Exporter",
    "Metric",
    "TraceWriter",
    "load_counts",
    "read_trace",
    "run_meta",
    "set_exporter",
    "snapshot",
    "trace_schema",
    "write_json",
]
__getattr__ = lazy_exports(__name__, _HOMES)

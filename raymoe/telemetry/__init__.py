"""What raymoe says about itself: metrics, routing traces, results as JSON, and reports with plots.

No torch and no Ray: ``actors/`` plugs the exporter in.
"""

from raymoe.telemetry.metrics import METRICS, Exporter, Metric, set_exporter, snapshot
from raymoe.telemetry.parts import Answer, Number, Report, Score, Serving, Table, Training
from raymoe.telemetry.report import write_report
from raymoe.telemetry.results import run_meta, write_json
from raymoe.telemetry.trace import TRACE_VERSION, TraceWriter, read_trace, trace_schema

__all__ = [
    "METRICS",
    "TRACE_VERSION",
    "Answer",
    "Exporter",
    "Metric",
    "Number",
    "Report",
    "Score",
    "Serving",
    "Table",
    "TraceWriter",
    "Training",
    "read_trace",
    "run_meta",
    "set_exporter",
    "snapshot",
    "trace_schema",
    "write_json",
    "write_report",
]

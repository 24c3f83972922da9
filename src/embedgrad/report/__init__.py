"""Reports for people: progress, tables, figures and pages."""

from embedgrad.report.sinks import EventLog, Sink, TensorBoard, fan_out
from embedgrad.report.terminal.progress import Progress
from embedgrad.report.terminal.tables import (
    changes_table,
    comparison_table,
    drift_table,
    show,
    verdict,
)

__all__ = [
    "EventLog",
    "Progress",
    "Sink",
    "TensorBoard",
    "changes_table",
    "comparison_table",
    "drift_table",
    "fan_out",
    "show",
    "verdict",
]

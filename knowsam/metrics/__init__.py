"""Dice, IoU, HD95, ASD and NSD per case and class, with a declared rule for empty masks."""

from knowsam.metrics.segmentation import (
    DISTANCE_METRICS,
    EMPTY_MODES,
    METRIC_NAMES,
    METRIC_RULES,
    NSD_TOLERANCE,
    OVERLAP_METRICS,
    STATUSES,
    ClassMetrics,
    Status,
    case_metrics,
    counts_in_mean,
)

__all__ = [
    "DISTANCE_METRICS",
    "EMPTY_MODES",
    "METRIC_NAMES",
    "METRIC_RULES",
    "NSD_TOLERANCE",
    "OVERLAP_METRICS",
    "STATUSES",
    "ClassMetrics",
    "Status",
    "case_metrics",
    "counts_in_mean",
]

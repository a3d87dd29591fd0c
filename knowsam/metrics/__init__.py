"""Overlap, error rates and distances per case and class, with declared rules for empty masks and ignored pixels."""

from knowsam.metrics.segmentation import (
    DISTANCE_METRICS,
    EMPTY_MODES,
    IGNORE_ID,
    MAIN_METRICS,
    METRIC_NAMES,
    METRIC_RULES,
    NSD_TOLERANCE,
    OVERLAP_METRICS,
    PIXEL_METRICS,
    STATUSES,
    ClassMetrics,
    Status,
    case_metrics,
    counts_in_mean,
)

__all__ = [
    "DISTANCE_METRICS",
    "EMPTY_MODES",
    "IGNORE_ID",
    "MAIN_METRICS",
    "METRIC_NAMES",
    "METRIC_RULES",
    "NSD_TOLERANCE",
    "OVERLAP_METRICS",
    "PIXEL_METRICS",
    "STATUSES",
    "ClassMetrics",
    "Status",
    "case_metrics",
    "counts_in_mean",
]

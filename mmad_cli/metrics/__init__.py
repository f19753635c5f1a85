"""Detection and segmentation metrics: pure functions of labels and scores, masks and maps."""

from mmad_cli.metrics.pro import aupro, aupro_exact, aupro_grid, pro_curve
from mmad_cli.metrics.roc import average_precision, f1_max, fpr_at_tpr, image_auroc, pixel_auroc, threshold_at_fpr
from mmad_cli.metrics.summary import METRIC_KEYS, METRICS_VERSION, VALIDATION_KEYS, MetricsResult, all_metrics

__all__ = [
    "METRICS_VERSION",
    "METRIC_KEYS",
    "VALIDATION_KEYS",
    "MetricsResult",
    "all_metrics",
    "aupro",
    "aupro_exact",
    "aupro_grid",
    "average_precision",
    "f1_max",
    "fpr_at_tpr",
    "image_auroc",
    "pixel_auroc",
    "pro_curve",
    "threshold_at_fpr",
]

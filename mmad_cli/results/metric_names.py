"""The metric keys of a run result, with the label and meaning that reports print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mmad_cli.errors import unknown_name


@dataclass(frozen=True)
class MetricName:
    """Key in `summary.json`, short label, direction, and one line on what it is."""

    key: str
    label: str
    meaning: str
    higher_is_better: bool = True


def _aupro(percent: int, grid: int | None = None) -> MetricName:
    suffix = f"_grid{grid}" if grid else ""
    rule = f"the published {grid}-threshold rule" if grid else "exact"
    return MetricName(
        key=f"aupro_{percent:02d}{suffix}",
        label=f"AUPRO@{percent}%" + (f" (grid {grid})" if grid else ""),
        meaning=f"area under the per-region-overlap curve up to {percent} % FPR, divided by it; {rule}",
    )


_ALL = (
    MetricName("i_auroc", "I-AUROC", "area under the ROC curve of the image scores"),
    MetricName("i_ap", "I-AP", "average precision of the image scores"),
    MetricName("i_f1max", "I-F1max", "best F1 of the image scores over all thresholds"),
    MetricName("i_fpr95", "I-FPR95", "image false-positive rate at 95 % true-positive rate", False),
    MetricName("p_auroc", "P-AUROC", "area under the ROC curve of all pixels of all test images"),
    MetricName("p_ap", "P-AP", "average precision of all pixels of all test images"),
    MetricName("p_f1max", "P-F1max", "best F1 of all pixels over all thresholds"),
    MetricName("p_fpr95", "P-FPR95", "pixel false-positive rate at 95 % true-positive rate", False),
    *(_aupro(percent) for percent in (30, 10, 5, 1)),
    _aupro(30, 100),
    *(_aupro(percent, 99) for percent in (30, 10, 5, 1)),
    MetricName(
        "i_fpr_val",
        "I-FPR@val",
        "image false-positive rate at the threshold that 0.5 % of the good validation images exceed",
        False,
    ),
    MetricName("i_tpr_val", "I-TPR@val", "image true-positive rate at that threshold"),
)

METRICS: dict[str, MetricName] = {metric.key: metric for metric in _ALL}

DEFAULT_METRICS = ("i_auroc", "p_auroc", "aupro_30", "aupro_30_grid100", "aupro_01")
# methods whose published AUPRO is made with 99 thresholds; that of the others with 100
_OF_99_THRESHOLDS = frozenset({"cfm", "mafr", "cmdr_iad"})


def default_metrics(methods: Iterable[str]) -> tuple[str, ...]:
    """Columns for runs of these methods: the AUPRO rule that their published numbers were made with stands in them."""
    rules = {99 if method in _OF_99_THRESHOLDS else 100 for method in methods} or {100}
    grids = tuple(f"aupro_30_grid{rule}" for rule in sorted(rules, reverse=True))
    return tuple(key for one in DEFAULT_METRICS for key in (grids if one == "aupro_30_grid100" else (one,)))


def label(key: str) -> str:
    """Label of a metric; the key itself for one that this version does not know."""
    return METRICS[key].label if key in METRICS else key


def higher_is_better(key: str) -> bool:
    """Whether a larger value is the better one."""
    return METRICS[key].higher_is_better if key in METRICS else True


def check_metrics(keys: Iterable[str], option: str, extra: Iterable[str] = ()) -> list[str]:
    """The keys without repetition; UsageError naming `option` for one neither known nor in `extra`."""
    known = {*METRICS, *extra}
    unique = list(dict.fromkeys(keys))
    for key in unique:
        if key not in known:
            raise unknown_name("metric", key, known, option)
    return unique

"""Names and numbers that settings of features have; apart from what computes, whose libraries take seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

#: The extractor whose Fréchet distance is FID.
INCEPTION = "inception"
#: How pixels are normalized for Torchvision's classifiers.
Normalize = Literal["imagenet", "half"]
Metric = Literal["frechet", "kernel", "precision_recall", "inception_score"]
#: Of larger sets so many pictures' features are kept; more of them take memory, and time that grows with the square.
KEPT_FEATURES = 50_000


def results_of(metric: Metric, is_fid: bool) -> list[str]:
    """What a metric's numbers are called; ``is_fid`` with Inception, which alone gives FID and KID."""
    names = {
        "frechet": ["fid" if is_fid else "frechet_distance"],
        "kernel": ["kid", "kid_std"] if is_fid else ["kernel_distance", "kernel_distance_std"],
        "precision_recall": ["precision", "recall"],
        "inception_score": ["inception_score", "inception_score_std"] if is_fid else [],
    }
    return names[metric]


def check_metrics(metrics: Sequence[Metric] | None, extractor: str | None) -> None:
    """Whether there are some, all of which this extractor has numbers for.

    Args:
        metrics: None is all that it has.
        extractor: its name.

    Raises:
        ValueError: if not.
    """
    if metrics is None:
        return
    if not metrics:
        raise ValueError(f"metrics is an empty list: give some of {', '.join(get_args(Metric))}")
    for metric in metrics:
        if not results_of(metric, extractor == INCEPTION):
            raise ValueError(
                f"the metric {metric!r} is of the extractor {INCEPTION!r}, but the extractor is {extractor!r}"
            )

"""Names and numbers that settings of features have; apart from what computes, whose libraries take seconds to import."""

from __future__ import annotations

from typing import Literal

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

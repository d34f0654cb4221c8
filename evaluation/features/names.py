"""Names and numbers that settings of features have; apart from what computes, whose libraries take seconds to import."""

from __future__ import annotations

from typing import Literal

#: The extractor whose Fréchet distance is FID.
INCEPTION = "inception"
#: How pixels are normalized for Torchvision's classifiers.
Normalize = Literal["imagenet", "half"]
Metric = Literal["frechet", "kernel", "precision_recall", "inception_score"]
#: What each metric is called in results: with Inception, and with other extractors.
RESULTS: dict[Metric, tuple[list[str], list[str]]] = {
    "frechet": (["fid"], ["frechet_distance"]),
    "kernel": (["kid", "kid_std"], ["kernel_distance", "kernel_distance_std"]),
    "precision_recall": (["precision", "recall"], ["precision", "recall"]),
    "inception_score": (["inception_score", "inception_score_std"], []),
}
#: Of larger sets so many pictures' features are kept; more of them take memory, and time that grows with the square.
KEPT_FEATURES = 50_000

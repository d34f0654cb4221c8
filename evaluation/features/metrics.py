"""Metrics between two sets of pictures: Fréchet distance from our moments, the others by torch-fidelity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tarflow.evaluation.features.extractors import Extractor
from tarflow.evaluation.features.frechet import bias_warning, frechet_distance
from tarflow.evaluation.features.names import KEPT_FEATURES, Metric, results_of
from tarflow.evaluation.features.statistics import Statistics, compute_statistics
from tarflow.evaluation.images.sets import ImageSet

#: torch-fidelity's defaults, written down here because results depend on them.
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE, NEIGHBOURS, SCORE_SPLITS, SEED = 100, 1000, 3, 10, 2020
#: The name under which features that are computed already go through torch-fidelity.
PASSED_ON = "tarflow-features"


def all_metrics(extractor: Extractor) -> tuple[Metric, ...]:
    """What can be computed with an extractor; the Inception Score needs the classes of Inception."""
    metrics: tuple[Metric, ...] = ("frechet", "kernel", "precision_recall")
    return (*metrics, "inception_score") if extractor.is_fid else metrics


def chosen_metrics(extractor: Extractor, metrics: Sequence[Metric] | None) -> tuple[Metric, ...]:
    """The metrics that are asked for; None takes all that can be computed.

    Raises:
        ValueError: for one that the extractor cannot give, or without torch-fidelity.
    """
    metrics = all_metrics(extractor) if metrics is None else tuple(metrics)
    if unknown := [metric for metric in metrics if metric not in all_metrics(extractor)]:
        raise ValueError(
            f"the metric {unknown[0]!r} cannot be had with the extractor {extractor.name!r}, which gives "
            f"{', '.join(all_metrics(extractor))}"
        )
    if set(metrics) - {"frechet"}:
        register()
    return metrics


def calculate(
    ref: Statistics | ImageSet,
    samples: Statistics | ImageSet,
    extractor: Extractor,
    metrics: Sequence[Metric] | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Metrics by name.

    "frechet" is called "fid" for Inception and "frechet_distance" for all other extractors; "kernel" is "kid" or
    "kernel_distance", the mean over 100 subsets of 1000 pictures (or as many as there are), and its standard deviation.
    "precision_recall" counts pictures in balls about each picture that reach to its third neighbour (Kynkäänniemi et
    al., 2019, there with features of VGG16). The last three see the features that the statistics kept.

    Args:
        ref: what the samples should look like, as pictures or statistics.
        samples: generated pictures, or their statistics.
        extractor: of the features.
        metrics: which ones; None takes all that the extractor allows.
        batch_size: for pictures.

    Raises:
        ValueError: for statistics of another extractor, too few pictures, or a metric that the extractor cannot give.
    """
    metrics = chosen_metrics(extractor, metrics)
    keep = KEPT_FEATURES if set(metrics) - {"frechet"} else 0
    ref, samples = (
        compute_statistics(images, extractor, batch_size, keep_features=keep)
        if isinstance(images, ImageSet)
        else images
        for images in (ref, samples)
    )
    for statistics in (ref, samples):
        if statistics.extractor != extractor.description:
            raise ValueError(
                f"the statistics of {statistics.source!r} are of another extractor than {extractor.name!r}"
            )
    result = {}
    if "frechet" in metrics:
        moments = (ref.moments, samples.moments)
        distance = frechet_distance(*(part for one in moments for part in (one.mean, one.covariance)))
        (name,) = results_of("frechet", extractor.is_fid)
        result[name] = distance
    return result | from_features(ref, samples, extractor, metrics)


def from_features(
    ref: Statistics, samples: Statistics, extractor: Extractor, metrics: tuple[Metric, ...]
) -> dict[str, float]:
    """What needs the features of single pictures, by torch-fidelity."""
    result: dict[str, float] = {}
    pair = [metric for metric in ("kernel", "precision_recall") if metric in metrics]
    if pair:
        real, drawn = (kept_features(statistics, least=NEIGHBOURS + 1) for statistics in (ref, samples))
        found = fidelity(drawn, real, kid="kernel" in pair, prc="precision_recall" in pair)
        if "kernel" in pair:
            mean, spread = results_of("kernel", extractor.is_fid)
            result[mean] = found["kernel_inception_distance_mean"]
            result[spread] = found["kernel_inception_distance_std"]
        if "precision_recall" in pair:
            result |= {name: found[name] for name in results_of("precision_recall", extractor.is_fid)}
    if "inception_score" in metrics:
        assert extractor.head is not None  # `chosen_metrics` has seen to it
        features = kept_features(samples, least=SCORE_SPLITS)
        # Without the bias, as the published score was computed; the head is a single product.
        found = fidelity(features @ extractor.head.detach().cpu().T, isc=True)
        mean, spread = results_of("inception_score", extractor.is_fid)
        result[mean], result[spread] = found["inception_score_mean"], found["inception_score_std"]
    return result


def kept_features(statistics: Statistics, least: int) -> Tensor:
    """The features that were kept.

    Raises:
        ValueError: if there are none, or too few.
    """
    features = statistics.features
    kept = 0 if features is None else len(features)
    if features is None or kept < least:
        raise ValueError(
            f"the metrics beside the Fréchet distance need the features of at least {least} pictures, but there are "
            f"{kept} of {statistics.source!r}: take more pictures, or --metrics [frechet]"
        )
    return features


class Rows(Dataset[Tensor]):
    """Rows of a tensor (N, D), one by one."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def fidelity(drawn: Tensor, real: Tensor | None = None, **wanted: bool) -> dict[str, float]:
    """torch-fidelity's metrics of features (N, D) that are given instead of pictures."""
    register()
    import torch_fidelity  # after `register`, which says so if it is not installed

    size = min(KERNEL_SUBSET_SIZE, len(drawn), KERNEL_SUBSET_SIZE if real is None else len(real))
    with torch.no_grad():
        return torch_fidelity.calculate_metrics(
            input1=Rows(drawn),
            input2=None if real is None else Rows(real),
            feature_extractor=PASSED_ON,
            cuda=False,
            cache=False,
            verbose=False,
            save_cpu_ram=True,
            batch_size=4096,
            rng_seed=SEED,
            kid_subsets=KERNEL_SUBSETS,
            kid_subset_size=size,
            prc_neighborhood=NEIGHBOURS,
            isc_splits=SCORE_SPLITS,
            **wanted,
        )


def register() -> None:
    """Make torch-fidelity know the extractor that passes features on; at most once, as it refuses a second time."""
    try:
        from torch_fidelity.feature_extractor_base import FeatureExtractorBase
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
    except ImportError as error:
        raise ValueError("torch-fidelity is not installed: pip install 'tarflow[evaluation]'") from error
    if PASSED_ON in FEATURE_EXTRACTORS_REGISTRY:
        return

    class PassedOn(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: Any):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 1)

        def forward(self, rows: Tensor) -> tuple[Tensor]:
            return (rows,)

    register_feature_extractor(PASSED_ON, PassedOn)


def warnings_of(ref: Statistics, samples: Statistics, extractor: Extractor) -> list[str]:
    """Sentences on what makes the numbers doubtful."""
    found = []
    for name, statistics in (("reference", ref), ("samples", samples)):
        if warning := bias_warning(statistics.count, extractor.dims):
            found.append(f"{name}: {warning}")
        found += [f"{name}: {note}" for note in statistics.notes]
    kept = [len(statistics.features) for statistics in (ref, samples) if statistics.features is not None]
    if len(kept) == 2 and min(kept) < KERNEL_SUBSET_SIZE:
        found.append(
            f"the kernel distance is over subsets of {min(kept)} pictures instead of {KERNEL_SUBSET_SIZE}, so its standard "
            "deviation says little"
        )
    if ref.size != samples.size:
        sizes = [f"{height}×{width}" for height, width in (ref.size, samples.size)]
        found.append(f"the reference has pictures of {sizes[0]}, the samples of {sizes[1]}; both are resized alike")
    if ref.data == samples.data:
        found.append("reference and samples are the same pictures")
    return found

"""Telling pictures that a flow was not trained on from those that it was, by its likelihood.

A flow can find pictures of another kind *more* likely than its own, if they are simpler (Nalisnick et al., *Do Deep
Generative Models Know What They Don't Know?*, 2019, arXiv:1810.09136). Their distance to the likelihood that is typical of
its own pictures tells them apart in that case too (Nalisnick et al., *Detecting Out-of-Distribution Inputs to Deep
Generative Models Using Typicality*, 2019, arXiv:1906.02994).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tarflow.common.charts import figure
from tarflow.data.images import Pictures
from tarflow.evaluation.likelihood.held_out import picture_likelihoods
from tarflow.pipeline.call.flow_pipeline import FlowPipeline


@dataclass(frozen=True)
class Detection:
    """How well a score tells pictures of another kind (positives) from a model's own.

    Attributes:
        name: of the score.
        inside, outside: scores of the model's own pictures and of the others, higher for stranger ones.
        false_positives, true_positives: rates along the thresholds, from 0 to 1.
        auc: area under that curve: the share of pairs in which the other picture has the higher score.
    """

    name: str
    inside: Tensor
    outside: Tensor
    false_positives: Tensor
    true_positives: Tensor
    auc: float


def roc(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor, float]:
    """The receiver operating characteristic of scores that are higher for strangers.

    Args:
        inside, outside: scores (N,) and (M,) of the model's own pictures and of the others.

    Returns:
        rates of false and true positives (K,), from 0 to 1, one for each threshold; and the area under the curve.
    """
    if not len(inside) or not len(outside):
        raise ValueError("there must be pictures of both kinds")
    inside, outside = inside.double().sort()[0], outside.double().sort()[0]
    thresholds = torch.cat([inside, outside]).unique(sorted=True).flip(0)  # called strange from here on

    def rate(scores: Tensor) -> Tensor:
        reached = 1 - torch.searchsorted(scores, thresholds).double() / len(scores)
        return torch.cat([reached.new_zeros(1), reached])

    false, true = rate(inside), rate(outside)
    return false, true, float(torch.trapezoid(true, false))


def typicality(values: Tensor, own: Tensor) -> Tensor:
    """Distance (N,) of nats per dimension (N,) to the mean of the model's own pictures' (M,), which are others than
    those that are scored."""
    return (values - own.mean()).abs()


def detect(
    pipe: FlowPipeline, inside: Pictures, outside: Pictures, own: Pictures, batch_size: int = 64, seed: int = 0
) -> list[Detection]:
    """Score pictures by nats per dimension under no condition, and by typicality.

    Args:
        pipe: a `TARFlowPipeline`.
        inside, outside: held-out pictures of the kind that it was trained on, and others; `Images` or a `Subset`.
        own: more pictures of its kind, for the mean of typicality.
        batch_size, seed: as of `picture_likelihoods`.

    Returns:
        one for each score.
    """

    def nats_of(images: Pictures) -> Tensor:
        _, values, _ = picture_likelihoods(
            pipe, images, draws=1, with_condition=False, batch_size=batch_size, seed=seed
        )
        return values[:, 0]

    nats = [nats_of(images) for images in (inside, outside, own)]
    scores = {
        "nats per dimension": (nats[0], nats[1]),
        "distance to typical nats": (typicality(nats[0], nats[2]), typicality(nats[1], nats[2])),
    }
    return [Detection(name, a, b, *roc(a, b)) for name, (a, b) in scores.items()]


def detection_chart(detections: list[Detection], names: tuple[str, str], title: str, path: Path) -> None:
    """A histogram of the first score, and the curves of all.

    Args:
        names: of the model's own pictures and of the others.
    """
    with figure(2, title, path) as (left, right):
        first = detections[0]
        every = torch.cat([first.inside, first.outside])
        edges = torch.linspace(float(every.min()), float(every.max()), 41).numpy()
        for name, values in zip(names, (first.inside, first.outside), strict=True):
            left.hist(values.numpy(), edges, density=True, alpha=0.6, label=name)
        left.set(xlabel=first.name, ylabel="density")
        left.legend(fontsize=7)
        for one in detections:
            label = f"{one.name}: AUC {one.auc:.3f}"
            right.plot(one.false_positives.numpy(), one.true_positives.numpy(), label=label)
        right.plot([0, 1], [0, 1], ":", color="grey")
        right.set(xlabel=f"{names[0]} called strange", ylabel=f"{names[1]} called strange")
        right.legend(fontsize=7, loc="lower right")

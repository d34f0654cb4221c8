"""Whether a model of pictures and captions finds a picture's own caption among others (retrieval, as of CLIP)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.common.statistics import mean_and_error
from tarflow.evaluation.features.clip_score import embeddings
from tarflow.evaluation.images.sets import ImageSet

#: The right caption must be among so many first ones, for each of the shares.
FIRST, TOP = 1, 5
#: Pictures that are compared with all captions at once: with 50,000 captions 200 MB.
TOGETHER = 1024


@dataclass(frozen=True)
class CaptionScore:
    """How often pictures are told by their captions.

    Attributes:
        first, top5: shares of pictures whose own caption is the first, or one of the first five, of ``among``.
        first_error, top5_error: their standard errors over the pictures.
        pictures, captions: how many there are; captions that are the same text count once.
        among: of how many captions the right one is chosen.
    """

    first: float
    first_error: float
    top5: float
    top5_error: float
    pictures: int
    captions: int
    among: int


def caption_score(
    images: ImageSet,
    captions: Sequence[str],
    model: str,
    among: int = 100,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> CaptionScore:
    """Shares of pictures whose own caption wins against others of the same set.

    Args:
        images: the pictures.
        captions: one for each, in the pictures' order.
        model: folder or hub id, see `clip_score`.
        among: of so many captions the right one is chosen; chance finds one in ``among``.
        batch_size: pictures per pass and process.
        device: where to run.

    Raises:
        ValueError: if there are fewer different captions than ``among``, captions are missing, or the model cannot be
            loaded.
    """
    first: dict[str, int] = {}
    for number, caption in enumerate(captions):
        first.setdefault(caption, number)
    check_among(among, len(first))
    pictures, texts = embeddings(images, captions, model, batch_size, device)
    place = {caption: number for number, caption in enumerate(first)}
    own = torch.tensor([place[caption] for caption in captions])
    return score_of(pictures, texts[torch.tensor(list(first.values()))], own, among)


def score_of(pictures: Tensor, captions: Tensor, own: Tensor, among: int) -> CaptionScore:
    """The same of embeddings.

    Args:
        pictures: (N, D).
        captions: (M, D), of different captions.
        own: (N,) int64, which caption is each picture's.
        among: at most M.
    """
    better = captions_before(pictures, captions, own).tolist()
    first, top5 = (
        torch.tensor([chance_of(count, len(captions), among, places) for count in better], dtype=torch.float64)
        for places in (FIRST, TOP)
    )
    right, right_five = mean_and_error(first), mean_and_error(top5)
    return CaptionScore(
        first=right[0],
        first_error=right[1],
        top5=right_five[0],
        top5_error=right_five[1],
        pictures=len(pictures),
        captions=len(captions),
        among=among,
    )


def captions_before(pictures: Tensor, captions: Tensor, own: Tensor) -> Tensor:
    """How many other captions are at least as near to each picture as its own: (N,) int64; see `score_of`."""
    pictures, captions = F.normalize(pictures.float(), dim=1), F.normalize(captions.float(), dim=1)
    found = []
    for part, right in zip(pictures.split(TOGETHER), own.split(TOGETHER), strict=True):
        similar = part @ captions.T  # (n, M)
        found.append((similar >= similar.gather(1, right[:, None])).sum(1) - 1)
    return torch.cat(found)


def chance_of(before: int, captions: int, among: int, places: int) -> float:
    """Chance that a caption is one of the first ``places`` of ``among``, if the others are drawn from all.

    The mean over all draws in closed form, so no draw adds noise: hypergeometric, of ``captions`` − 1 others, ``before``
    of which are nearer, ``among`` − 1 are drawn and fewer than ``places`` of them may be nearer.
    """
    others, drawn = captions - 1, among - 1
    possible = range(max(0, drawn - (others - before)), min(places, before + 1, drawn + 1))
    logs = [log_ways(before, k) + log_ways(others - before, drawn - k) - log_ways(others, drawn) for k in possible]
    return min(1.0, math.fsum(math.exp(log) for log in logs))


def log_ways(n: int, k: int) -> float:
    """Logarithm of the number of ways to choose k of n."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def check_among(among: int, captions: int) -> None:
    """Refuse more captions to choose from than there are.

    Raises:
        ValueError: that says how many there are.
    """
    if captions < among:
        raise ValueError(
            f"the right caption is to be found among {among}, but there are only {captions} different ones: take more "
            "pictures, or a smaller --among"
        )


def without(captions: Sequence[str], remove: str | None) -> list[str]:
    """Captions without what a regular expression finds in them, such as ``, \\w+ style$``.

    Raises:
        ValueError: if it is no regular expression, or leaves nothing of a caption.
    """
    if remove is None:
        return list(captions)
    try:
        found = [re.sub(remove, "", caption).strip() for caption in captions]
    except re.error as error:
        raise ValueError(f"remove {remove!r} is no regular expression: {error}") from error
    for caption, rest in zip(captions, found, strict=True):
        if caption.strip() and not rest:
            raise ValueError(f"remove {remove!r} leaves nothing of the caption {caption!r}")
    return found


def score_lines(score: CaptionScore) -> str:
    """The shares in words."""
    chance = f"among {score.among} of {score.captions} captions, {score.pictures} pictures"
    lines = []
    for name, share, error in (
        ("right caption first", score.first, score.first_error),
        ("among the first five", score.top5, score.top5_error),
    ):
        spread = "" if math.isnan(error) else f" ± {100 * error:.1f}"
        lines.append(f"{name:<22}{100 * share:.1f} %{spread}")
    return "\n".join([*lines, chance])

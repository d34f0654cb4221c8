"""Settings of reconstructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tarflow.common.checks import AtLeastOne, check_ranges
from tarflow.data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """What to reconstruct.

    Attributes:
        pipeline: folder, shipped name or hub id.
        data: the pictures.
        out: folder of the pictures.
        split: "train" or "validation".
        num: how many pictures; None takes all.
        batch_size: pictures at once.
    """

    pipeline: str
    data: DataConfig
    out: str
    split: Literal["train", "validation"] = "validation"
    num: AtLeastOne | None = 1000
    batch_size: AtLeastOne = 64

    def __post_init__(self) -> None:
        check_ranges(self)
        self.data.check_count(self.num, "num")

"""An endless mixture of sources of pictures, and of streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from tarflow.data.images import Images
from tarflow.data.stream.first import check_squares, without_conditions
from tarflow.data.stream.stream import Stream
from tarflow.training.autoencoder.config import TrainVaeConfig

#: More than any run takes; data sets of this length are gone through in their own order.
LENGTH = 2**40
#: Sets the choices apart from what the sources draw of the same seeds and numbers of pictures, backgrounds for example.
STREAM = 2


class Mixture(Dataset[dict[str, Any]]):
    """Pictures of several sources; item i is a pure function of the seed and i.

    Args:
        sources: the sources.
        shares: how often each is drawn from, relative to the others.
        seed: of the choices.
    """

    def __init__(self, sources: Sequence[Images], shares: Sequence[float], seed: int):
        self.sources, self.seed = list(sources), seed
        self.shares = np.array(shares) / sum(shares)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index, STREAM))
        source = self.sources[int(rng.choice(len(self.sources), p=self.shares))]
        item = source[int(rng.integers(len(source)))]
        if source.config.flip and rng.random() < 0.5:
            item["image"] = item["image"].flip(-1)
        return {"image": item["image"], "skipped": item["skipped"]}


def open_sources(config: TrainVaeConfig) -> Mixture | Stream:
    """The training pictures of all sources. Where one is a stream, all are read as one, in which pictures by number are
    shuffled among each other.

    Raises:
        ValueError: what the sources raise, and if their streams want other lanes than each other.
    """
    parts = {name: (source.share, source.data) for name, source in config.sources.items()}
    streams = [data for _, data in parts.values() if data.is_stream]
    if not streams:
        images = [Images(data, "train") for _, data in parts.values()]
        return Mixture(images, [share for share, _ in parts.values()], config.seed)
    for data in streams:
        check_squares(data)
    lanes = {data.lanes for data in streams if data.lanes is not None}
    if len(lanes) > 1:
        raise ValueError(f"the sources have different data.lanes, {sorted(lanes)}: give all the same, or none")
    flattened = {}
    for name, (share, data) in parts.items():
        if not data.is_stream:
            flattened[name] = share, data
            continue
        total = sum(weight for weight, _ in data.parts.values())
        for part, (weight, settings) in without_conditions(data).parts.items():
            # Names of sources have no slash, so each has its own place.
            flattened[f"{name}/{part}"] = share * weight / total, settings
    whole = replace(streams[0], lanes=lanes.pop() if lanes else None)
    return Stream(whole, "train", config.seed, parts=flattened, mirrored=True)

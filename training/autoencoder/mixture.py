"""An endless mixture of sources of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from tarflow.data.images import Images

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

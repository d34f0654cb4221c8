"""Training pictures that are nearest to samples: whether a model copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tarflow.common.progress import progress_bar
from tarflow.data.images import collate

#: Pixels are compared after averaging to this side.
PIXEL_SIDE = 32

#: uint8 pictures (B, 3, H, W) → (B, D)
Describe = Callable[[Tensor], Tensor]


def pixel_description(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) averaged to `PIXEL_SIDE`², scaled so that distances are root mean square differences in
    grey levels: (B, D)."""
    side = min(PIXEL_SIDE, *images.shape[2:])
    flat = F.adaptive_avg_pool2d(images.float() - 128, side).flatten(1)
    return flat / flat.shape[1] ** 0.5


@dataclass(frozen=True)
class Neighbours:
    """The training pictures nearest to N pictures, in one space.

    Attributes:
        distances: (N, K), ascending.
        indices: (N, K), of the training pictures.
    """

    distances: Tensor
    indices: Tensor

    @property
    def nearest(self) -> Tensor:
        """Distance to the nearest training picture, (N,)."""
        return self.distances[:, 0]


def nearest_neighbours(
    queries: dict[str, Tensor],
    images: Any,
    spaces: dict[str, Describe],
    own: dict[str, Tensor] | None = None,
    k: int = 3,
    batch_size: int = 256,
) -> dict[str, dict[str, Neighbours]]:
    """Search training pictures, which are read once.

    Args:
        queries: groups of uint8 pictures (N, 3, H, W).
        images: the training pictures, more than k; `Images` or a `Subset`.
        spaces: by name, how pictures are described.
        own: of groups that are training pictures, their indices (N,): each finds others than itself.
        k: neighbours of each query.

    Returns:
        by space and group.
    """
    described = {
        space: {
            group: torch.cat([describe(part).float().cpu() for part in pictures.split(batch_size)])
            for group, pictures in queries.items()
        }
        for space, describe in spaces.items()
    }
    found: dict[str, dict[str, Neighbours]] = {space: {} for space in spaces}
    for first in progress_bar(range(0, len(images), batch_size), desc="neighbours", unit="batch"):
        indices = torch.arange(first, min(first + batch_size, len(images)))
        batch = collate([images[i] for i in indices.tolist()])["image"]
        for space, describe in spaces.items():
            descriptions = describe(batch).float().cpu()
            for group, query in described[space].items():
                # By differences: by products, as is the default, a copy would be 0.1 grey levels away.
                distances = torch.cdist(query, descriptions, compute_mode="donot_use_mm_for_euclid_dist")  # (N, B)
                if own is not None and group in own:
                    distances[own[group][:, None] == indices] = torch.inf
                candidates = Neighbours(distances, indices.expand(len(query), -1))
                found[space][group] = best_of(found[space].get(group), candidates, k)
    return found


def best_of(old: Neighbours | None, new: Neighbours, k: int) -> Neighbours:
    """The k nearest of both."""
    distances = new.distances if old is None else torch.cat([old.distances, new.distances], dim=1)
    indices = new.indices if old is None else torch.cat([old.indices, new.indices], dim=1)
    kept, order = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
    return Neighbours(kept, indices.gather(1, order))

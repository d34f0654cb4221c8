"""Several caches of latents as one: whether they fit together, their statistics, and in which order their shards count."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tarflow.data.latent_cache import LatentCache

#: What must be the same in all, where it stands in the manifest, and what a reader calls it.
ALIKE = (
    ("image_size", "of pictures of {} pixels"),
    ("factor", "of an autoencoder of factor {}"),
    ("class_names", "of the classes {}"),
    ("has_captions", "with captions: {}"),
)


@dataclass(frozen=True)
class Piece:
    """A shard among those of all caches: its cache, its number there, how many items it has, and their latents' shape."""

    cache: int
    number: int
    count: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class Stream:
    """Latents of one shape that are gone through in an order of their own.

    Attributes:
        group: number of the shape.
        share: of all pictures that are trained on.
        shards: the items of each shard.
        places: numbers of these shards among those of all caches.
    """

    group: int
    share: float
    shards: list[range]
    places: list[int]


def check_alike(caches: Sequence[LatentCache]) -> None:
    """Refuse caches that cannot be trained on together.

    Raises:
        ValueError: that names two of them and what differs.
    """
    first, *others = caches
    for other in others:
        here, there = first.manifest, other.manifest
        names = f"the caches {first.name!r} and {other.name!r} do not fit together:"
        if here["autoencoder"]["hash"] != there["autoencoder"]["hash"]:
            hashes = " and ".join(
                f"{one['autoencoder']['name']!r} ({one['autoencoder']['hash'][:8]})" for one in (here, there)
            )
            raise ValueError(
                f"{names} their latents are of different autoencoders, or of one with different scaling factors, {hashes}; "
                "cache both with the same"
            )
        if text_of(here) != text_of(there):
            raise ValueError(
                f"{names} their captions were encoded with {text_of(here) or 'no text encoder'} and "
                f"{text_of(there) or 'no text encoder'}; cache both with the same"
            )
        for key, words in ALIKE:
            if here[key] != there[key]:
                raise ValueError(f"{names} one is {words.format(here[key])}, the other {words.format(there[key])}")


def text_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What encoded a cache's captions; None if nothing did. Which captions were too long says nothing of that."""
    text = manifest["text"]
    return text and {name: value for name, value in text.items() if name != "cut"}


def pooled_statistics(
    caches: Sequence[LatentCache], weights: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of what is trained on, of those of the caches' training pictures.

    Args:
        caches: opened ones.
        weights: of the caches; None takes their numbers of pictures.
    """
    if len(caches) == 1:
        return caches[0].manifest["latents_mean"], caches[0].manifest["latents_std"]
    shares = [cache.manifest["pictures"]["train"] for cache in caches] if weights is None else list(weights)
    total = sum(shares)
    means, stds = ([cache.manifest[f"latents_{name}"] for cache in caches] for name in ("mean", "std"))
    mean = [sum(s * m for s, m in zip(shares, channel, strict=True)) / total for channel in zip(*means, strict=True)]
    std = []
    for channel, (centres, deviations) in enumerate(
        zip(zip(*means, strict=True), zip(*stds, strict=True), strict=True)
    ):
        squares = sum(s * (m * m + d * d) for s, m, d in zip(shares, centres, deviations, strict=True)) / total
        std.append(max(0.0, squares - mean[channel] ** 2) ** 0.5)
    return mean, std


def pieces_of(caches: Sequence[LatentCache]) -> list[Piece]:
    """The shards of all caches, those of one shape together, shapes and caches in the order in which they come."""
    found: dict[tuple[int, int], list[Piece]] = {}
    for number, cache in enumerate(caches):
        for place, shard in enumerate(cache.shards):
            height, width = shard["shape"]
            found.setdefault((height, width), []).append(Piece(number, place, shard["count"], (height, width)))
    return [piece for pieces in found.values() for piece in pieces]


def groups_of(pieces: Sequence[Piece]) -> tuple[list[tuple[int, int]], list[range]]:
    """Latent shapes of consecutive shards, and the range of items of each."""
    shapes: list[tuple[int, int]] = []
    groups: list[range] = []
    end = 0
    for piece in pieces:
        start, end = end, end + piece.count
        if shapes and shapes[-1] == piece.shape:
            groups[-1] = range(groups[-1].start, end)
        else:
            shapes.append(piece.shape)
            groups.append(range(start, end))
    return shapes, groups


def streams_of(
    pieces: Sequence[Piece], firsts: Sequence[int], groups: Sequence[range], weights: Sequence[float] | None
) -> list[Stream]:
    """What is gone through in an order of its own: each shape, and with weights each cache's part of it.

    Args:
        pieces: see `pieces_of`.
        firsts: number of the first item of each.
        groups: items of each shape.
        weights: of the caches; of those that have no items here nothing is taken.
    """
    counts = {piece.cache: 0 for piece in pieces}
    for piece in pieces:
        counts[piece.cache] += piece.count
    present = sum(weights[cache] for cache in counts) if weights is not None else 0.0
    found = []
    for number, group in enumerate(groups):
        places = range(bisect_right(firsts, group.start) - 1, bisect_right(firsts, group.stop - 1))
        kinds = [None] if weights is None else sorted({pieces[place].cache for place in places})
        for kind in kinds:
            mine = [place for place in places if kind is None or pieces[place].cache == kind]
            shards = [range(firsts[place], firsts[place] + pieces[place].count) for place in mine]
            count = sum(map(len, shards))
            if weights is None or kind is None:
                share = count / sum(counts.values())
            else:
                share = weights[kind] / present * count / counts[kind]
            found.append(Stream(number, share, shards, mine))
    return found

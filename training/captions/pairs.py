"""Pictures with all their captions, split so that nothing that is held out is trained on in another style."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tarflow.data.captions import read_metadata
from tarflow.data.folder import ImageFolder
from tarflow.data.images import Images
from tarflow.data.stream.captioned import CaptionedRows
from tarflow.evaluation.features.caption_ranks import without
from tarflow.training.captions.config import CaptionModelConfig


@dataclass(frozen=True)
class Pairs:
    """Pictures of one split: which of the data's items shows each, and its captions, the first of which names it.

    Attributes:
        images: the data.
        indices: of the items, ascending.
        captions: all of each picture, at least one.
        left_out: pictures that show what another one shows that is held out.
    """

    images: Images | CaptionedRows
    indices: list[int]
    captions: list[list[str]]
    left_out: int = 0

    @property
    def first(self) -> list[str]:
        return [captions[0] for captions in self.captions]

    @property
    def facts(self) -> Any:
        """What tells that the pictures changed."""
        if isinstance(self.images, CaptionedRows):
            return self.images.fingerprint, self.indices
        facts = self.images.facts(len(self.images)), self.indices
        # Earlier versions kept the next picture's features for one that cannot be read.
        return facts if self.images.config.on_error == "raise" else (*facts, "without the unreadable")

    def pictures(self) -> Iterator[tuple[int, Tensor | None]]:
        """The pictures, uint8 (3, S, S), each with its number among these, as they come; None for one that cannot be read,
        where that is allowed."""
        if isinstance(self.images, CaptionedRows):
            return self.images.pictures(self.indices)
        items = enumerate(self.images[index] for index in self.indices)
        return ((number, None if item["skipped"] else item["image"]) for number, item in items)  # not another's

    def only(self, usable: Sequence[bool]) -> Pairs:
        """Those pictures that are usable."""
        places = [place for place, good in enumerate(usable) if good]
        return replace(
            self,
            indices=[self.indices[place] for place in places],
            captions=[self.captions[place] for place in places],
        )


def open_pairs(config: CaptionModelConfig) -> tuple[Pairs, Pairs]:
    """Training and held-out pictures.

    Raises:
        ValueError: without captions, without held-out pictures, or for a column that the data has not.
    """
    if config.data.source == "drawings":
        raise ValueError(
            "drawings have no end, and a checker of their own: name pictures with captions (data.source folder)"
        )
    counts = {"train": config.num_images, "validation": config.num_validation_images}
    train, held_out = (open_split(config, split, count) for split, count in counts.items())
    for images in (train, held_out):
        if not images.has_captions:
            raise ValueError(
                "the data has no captions: a model of pictures and captions needs metadata.jsonl, or a caption_column"
            )
        if not len(images):
            raise ValueError(
                f"the split {images.split!r} of the data is empty: set data.validation_fraction so that both have pictures"
            )
    held = grouped(held_out, config.remove)[: counts["validation"]]
    every = grouped(train, config.remove)[: counts["train"]]
    columns = concept_columns([images for images in (train, held_out) if isinstance(images, Images)], config.concept)
    seen = {key for index, captions in held for key in keys(held_out, index, captions, columns)}
    kept = [one for one in every if seen.isdisjoint(keys(train, *one, columns))]
    if not kept:
        raise ValueError("every training picture shows what is held out too: lower data.validation_fraction")
    pairs = Pairs(train, [index for index, _ in kept], [captions for _, captions in kept], len(every) - len(kept))
    return pairs, Pairs(held_out, [index for index, _ in held], [captions for _, captions in held])


def open_split(config: CaptionModelConfig, split: str, count: int | None) -> Images | CaptionedRows:
    """The pictures of one split; of a stream at most ``count``."""
    if config.data.is_stream:
        return CaptionedRows(config.data, split, count, config.concept)
    return Images(config.data, split)


def grouped(images: Images | CaptionedRows, remove: str | None) -> list[tuple[int, list[str]]]:
    """The first item of each picture, with the captions of all its items."""
    if isinstance(images, CaptionedRows):
        return [(index, list(dict.fromkeys(without(texts, remove)))) for index, texts in enumerate(images.captions)]
    source = images.source
    captions = without([images.caption(index) or "" for index in range(len(images))], remove)
    names = [row.name for row in source.rows] if isinstance(source, ImageFolder) else range(len(images))
    found: dict[Any, tuple[int, list[str]]] = {}
    for index, (name, caption) in enumerate(zip(names, captions, strict=True)):
        found.setdefault(name, (index, []))[1].append(caption)
    return [(index, list(dict.fromkeys(texts))) for index, texts in found.values()]


def concept_columns(splits: Sequence[Images], columns: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """By a picture's file name, the wanted columns with their values; empty ones say nothing."""
    if not columns or not splits:
        return {}
    sources = [images.source for images in splits]
    rows: list[dict[str, Any]] = []
    for source in sources:
        if not isinstance(source, ImageFolder):
            raise ValueError(
                f"concept names the columns {', '.join(columns)} of metadata.jsonl, which only data.source 'folder' has"
            )
        if not rows:
            images = [row.name for each in sources if isinstance(each, ImageFolder) for row in each.rows]
            others = set(source.files.images()) - set(images)
            left_out = [*others, *source.files.unreadable_images(), *source.files.other_images()]
            rows = read_metadata(source.files, list(dict.fromkeys(images)), left_out)
    known = set().union(*rows)
    if unknown := [column for column in columns if column not in known]:
        raise ValueError(f"concept names the column {unknown[0]!r}, but the data has {', '.join(sorted(known))}")
    found: dict[str, list[tuple[str, str]]] = {}
    for row in rows:  # a picture may have several
        values = [(column, str(row[column]).casefold()) for column in columns if row.get(column)]
        found.setdefault(row["file_name"], []).extend(values)
    return found


def keys(
    images: Images | CaptionedRows, index: int, captions: list[str], columns: dict[str, list[tuple[str, str]]]
) -> set[tuple[str, str]]:
    """What says that two pictures show the same: the first caption, and the columns."""
    if isinstance(images, CaptionedRows):
        more = images.values[index]
    else:
        more = columns.get(images.source.rows[index].name, []) if isinstance(images.source, ImageFolder) else []
    return {("", captions[0].casefold()), *more}

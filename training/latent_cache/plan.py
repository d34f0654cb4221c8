"""What a cache of latents will hold: which pictures, of which size, in which shard, and what that depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tarflow.data.config import DataConfig
from tarflow.data.images import Images, nearest_size
from tarflow.data.shards import FORMAT
from tarflow.pipeline.call.aspect import bucket_size, ratio_of
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.training.loop.batches import SHUFFLE_LIMIT

SPLITS = ("train", "validation")
#: Settings of the data that stand in every cache.
SINCE_FIRST = (
    *("source", "path", "split_folders", "name", "data_files", "image_size", "train_split", "validation_split"),
    *("validation_fraction", "image_column", "caption_column", "label_column", "caption_template"),
    *("more_caption_templates", "where", "class_names", "background", "seed"),
)
#: Those that have no effect here, or none on pictures that can be read.
WITHOUT_EFFECT = ("flip", "verify", "on_error", "weights", "shuffle_shards", "cache_gb", "lanes", "shuffle_buffer")
#: What a source's facts tell, in words.
CHANGES = {
    "files": "the names of files",
    "classes": "the class names",
    "labels": "the class labels",
    "captions": "the captions",
    "sizes": "the sizes or contents of files",
    "times": "the times of files",
    "data": "the files of the data set",
}


@dataclass(frozen=True)
class Shard:
    """One file of a cache.

    Attributes:
        file: its name.
        size: height and width of its pictures, in pixels.
        first: number of its first picture within the split.
        indices: of its pictures in the source.
    """

    file: str
    split: str
    size: tuple[int, int]
    first: int
    indices: Sequence[int]


@dataclass(frozen=True)
class CachePlan(ABC):
    """What a cache will hold.

    Attributes:
        config: what to cache.
        settings: everything that decides what is in the shards, by section, as JSON has it. Which pictures, captions
            and labels there are is told by hashes; of a stream by those of its shards' names.
        class_names, has_captions: of the pictures.
    """

    config: CacheConfig
    settings: dict[str, Any]
    class_names: tuple[str, ...] | None
    has_captions: bool

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.settings)

    @abstractmethod
    def own_files(self, names: Collection[str]) -> list[str]:
        """Of a folder's files those that are named as shards of this plan."""

    @abstractmethod
    def in_order(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Records of all shards in the manifest's order."""


@dataclass(frozen=True)
class Plan(CachePlan):
    """The shards of a cache of pictures by number.

    Attributes:
        images: the pictures by split.
        counts: how many of them are cached, by split.
        shards: all.
    """

    images: dict[str, Images]
    counts: dict[str, int]
    shards: list[Shard]

    def own_files(self, names: Collection[str]) -> list[str]:
        return [shard.file for shard in self.shards if shard.file in names]

    def in_order(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        by_file = {record["file"]: record for record in records}
        return [by_file[shard.file] for shard in self.shards]

    def header(self, shard: Shard) -> dict[str, Any]:
        """What a shard of this plan must tell about itself."""
        indices = hashlib.sha256(repr(list(shard.indices)).encode()).hexdigest()
        identity = {"split": shard.split, "size": list(shard.size), "first": shard.first, "count": len(shard.indices)}
        return {"format": FORMAT, "fingerprint": self.fingerprint, **identity, "indices": indices}


def fingerprint_of(settings: dict[str, Any]) -> str:
    """The hash by which a cache is known."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def make_plan(config: CacheConfig, factor: int, autoencoder: str, text: dict[str, Any] | None) -> Plan:
    """Open the pictures and deal them out to shards: the same in every process.

    Args:
        config: what to cache.
        factor: of the autoencoder.
        autoencoder: its hash.
        text: what the text encoder is, None if captions are not encoded.

    Raises:
        ValueError: if pictures, encoders and sizes do not fit together.
    """
    images = {"train": (train := Images(config.data, "train")), "validation": Images(config.data, "validation", train)}
    if text is not None and not images["train"].has_captions:
        raise ValueError("text.kind is 'pretrained', but the data has no captions")
    counts, shards = {}, []
    for split, wanted, option in zip(
        SPLITS, (config.num_images, config.num_validation_images), ("num_images", "num_validation_images"), strict=True
    ):
        if wanted is None and len(images[split]) > SHUFFLE_LIMIT:
            raise ValueError(f"data.source {config.data.source!r} is endless: say with {option} how many to cache")
        counts[split] = len(images[split]) if wanted is None else min(wanted, len(images[split]))
        first, number = 0, 0
        for size, indices in group_by_size(images[split], counts[split], config, factor * config.unit).items():
            for start in range(0, len(indices), config.shard_size):
                part = indices[start : start + config.shard_size]
                shards.append(Shard(f"{split}-{number:05d}.safetensors", split, size, first, part))
                first, number = first + len(part), number + 1
    pictures = {split: images[split].facts(counts[split]) for split in SPLITS}
    options = {"pictures": counts, **options_of(config, factor)}
    settings = settings_of(config, autoencoder, text, options, pictures)
    return Plan(config, settings, train.class_names, train.has_captions, images, counts, shards)


def options_of(config: CacheConfig, factor: int) -> dict[str, Any]:
    """What else decides what is in the shards."""
    names = ("flip", "shard_size", "dtype", "mixed_precision", "aspect_ratios", "unit")
    return {"factor": factor, **{name: getattr(config, name) for name in names}}


def settings_of(
    config: CacheConfig,
    autoencoder: str,
    text: dict[str, Any] | None,
    options: dict[str, Any],
    pictures: dict[str, Any],
) -> dict[str, Any]:
    """A plan's settings, by section, as JSON has them."""
    settings = {"data": data_settings(config.data), "autoencoder": {"hash": autoencoder}, "text": text or {}}
    found: dict[str, Any] = json.loads(json.dumps({**settings, "options": options, "pictures": pictures}))
    return found


def data_settings(config: DataConfig) -> dict[str, Any]:
    """What of the data section decides what is cached. What came later than caches of this format has its place only where
    it is not the default, so that earlier caches are known again."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in SINCE_FIRST or (field.name not in WITHOUT_EFFECT and value != field.default):
            found[field.name] = value
    return json.loads(json.dumps(found, default=dataclasses.asdict))


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first setting in which two caches differ, or what has changed about the pictures, in words."""
    if "pictures" not in found:
        return "it is of an earlier version, which did not note its pictures"
    for section, values in wanted.items():
        others = found.get(section, {})
        for key in sorted(values.keys() | others.keys()):
            there, here = others.get(key), values.get(key)
            if there == here:
                continue
            if section != "pictures":
                return f"{section}.{key} is {there!r} there and {here!r} here"
            return (
                f"of the {'training' if key == 'train' else 'held-out'} pictures {changes(there, here)} changed since"
            )
    return "it was made by another version"


def changes(there: dict[str, str] | None, here: dict[str, str] | None) -> str:
    """Which facts about pictures differ, in words. Where names do, sizes and times tell nothing."""
    changed = [name for name in CHANGES if (there or {}).get(name) != (here or {}).get(name)]
    if "files" in changed:
        changed = [name for name in changed if name not in ("sizes", "times")]
    return " and ".join(CHANGES[name] for name in changed)


def without_times(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the times of files, which copies of the data need not share."""
    pictures = {split: {**facts, "times": None} for split, facts in settings["pictures"].items()}
    return {**settings, "pictures": pictures}


def group_by_size(
    images: Images, count: int, config: CacheConfig, multiple: int
) -> dict[tuple[int, int], Sequence[int]]:
    """Indices of the first ``count`` pictures, by the height and width that they are brought to.

    Raises:
        ValueError: if squares of ``data.image_size`` are no multiple of ``multiple`` pixels, or a picture cannot be
            read and is not to be skipped.
    """
    side = config.data.image_size
    if config.aspect_ratios is None:
        if side % multiple:
            raise ValueError(f"data.image_size ({side}) must be a multiple of {multiple}, the autoencoder's × unit")
        return {(side, side): range(count)}
    sizes = [bucket_size(ratio_of(name), side, multiple) for name in config.aspect_ratios]
    groups: dict[tuple[int, int], list[int]] = {size: [] for size in sizes}
    waiting: list[int] = []  # unreadable pictures, which the next readable one replaces
    for index, found in enumerate(picture_sizes(images, count, config.num_workers)):
        waiting.append(index)
        if found is not None:
            groups[nearest_size(sizes, *found)] += waiting
            waiting = []
    groups[sizes[0]] += waiting
    return dict(groups)


class PictureSizes(Dataset[tuple[int, int] | None]):
    """Height and width of each picture, None for those that cannot be read and are to be skipped."""

    def __init__(self, images: Images, count: int):
        self.images, self.count = images, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, int] | None:
        try:
            return self.images.source.size(index)
        except ValueError:
            if self.images.config.on_error == "raise":
                raise
            return None


def picture_sizes(images: Images, count: int, workers: int) -> list[tuple[int, int] | None]:
    """Height and width of the first ``count`` pictures."""
    loader = DataLoader(PictureSizes(images, count), batch_size=256, num_workers=workers, collate_fn=list)
    return [size for batch in loader for size in batch]

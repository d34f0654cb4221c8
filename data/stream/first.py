"""The first pictures of a stream by number, for whoever wants some pictures of any source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from tarflow.data.config import DataConfig
from tarflow.data.folder import say_once
from tarflow.data.images import Images
from tarflow.data.stream.rows import Row
from tarflow.data.stream.stream import Stream


class FirstPictures(Dataset[dict[str, Any]]):
    """The first pictures of a stream in the order of its shards, read and decoded once, in groups of one size.

    Args:
        stream: of one split.
        count: how many at most. Where held-out rows lie among the others, the stream is read until so many are found.

    Attributes:
        groups: numbers of the pictures of each size.

    Raises:
        ValueError: that names shard and key of a row that cannot be read.
    """

    def __init__(self, stream: Stream, count: int):
        self.config, self.split = stream.config, stream.split
        self.class_names, self.has_captions = stream.class_names, stream.has_captions
        items: list[dict[str, Any]] = []
        skipped: list[str] = []
        for row in () if not count else stream.one_pass(shuffled=False):
            try:
                items += [] if isinstance(row, str) else [stream.readers[row.source].item(row)]
                skipped += [row] if isinstance(row, str) else []
            except ValueError as error:
                if self.config.on_error == "raise":
                    raise
                skipped.append(str(error))
            if len(items) == count:  # before the next row is read, which may lie far behind
                break
        if skipped:
            say_once(f"{len(skipped)} rows cannot be read and are left out, for example: {skipped[0]}")
        self.items = sorted(items, key=lambda item: tuple(item["image"].shape))
        shapes = [tuple(item["image"].shape) for item in self.items]
        self.groups = [range(shapes.index(one), shapes.index(one) + shapes.count(one)) for one in sorted(set(shapes))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.items[index])

    def caption(self, index: int) -> str | None:
        """The caption alone."""
        found: str | None = self.items[index].get("caption")
        return found


class FirstCaptions:
    """The captions of a stream's split by number, in the order of its shards, read when they are asked for; after the last
    comes the first again. Rows that cannot be read are left out where that is allowed.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, config: DataConfig, split: str):
        self.stream = Stream(config, split, config.seed)
        if not self.stream.has_captions:
            raise ValueError(f"the data's split {split!r} has no captions: name their column by data.caption_column")
        self._found: list[str] = []
        self._rest = self._captions()

    def __getitem__(self, index: int) -> str:
        while len(self._found) <= index and (caption := next(self._rest, None)) is not None:
            self._found.append(caption)
        if not self._found:
            raise ValueError(f"the data's split {self.stream.split!r} is empty")
        return self._found[index % len(self._found)]

    def _captions(self) -> Iterator[str]:
        for row in self.stream.one_pass(shuffled=False):
            if isinstance(row, Row):
                try:
                    yield self.stream.readers[row.source].caption(row)
                except ValueError:
                    if self.stream.config.on_error == "raise":
                        raise


#: Pictures of any source.
AnyPictures = Images | Stream | FirstPictures


def open_pictures(
    config: DataConfig, split: str, count: int | None, option: str, seed: int = 0
) -> Images | FirstPictures:
    """Pictures of a split by number; of a stream the first ones.

    Args:
        config: the data section of a configuration.
        split: "train" or "validation".
        count: of a stream, how many at most. They are held in memory.
        option: what that number is called, for messages.
        seed: of a stream's captions.

    Raises:
        ValueError: what both raise, and of a stream without a number.
    """
    if not config.is_stream:
        return Images(config, split)
    if count is None:
        raise ValueError(
            f"the data is a stream, which does not tell how many pictures it has: say how many to take by {option}"
        )
    return FirstPictures(square_stream(config, split, seed), count)


def open_training(config: DataConfig, seed: int) -> Images | Stream:
    """Training pictures of any source, squares.

    Args:
        config: the data section of a configuration.
        seed: of a stream's order and captions.

    Raises:
        ValueError: what both raise.
    """
    return square_stream(config, "train", seed) if config.is_stream else Images(config, "train")


def square_stream(config: DataConfig, split: str, seed: int) -> Stream:
    """A stream of squares.

    Raises:
        ValueError: if other sizes are wished, which flows alone are trained on.
    """
    check_squares(config)
    return Stream(config, split, seed)


def check_squares(config: DataConfig) -> None:
    """An error if other sizes are wished, which flows alone are trained on."""
    if config.aspect_ratios is not None:
        raise ValueError("data.aspect_ratios is set, but only flows are trained on several sizes: leave it out")


def without_conditions(config: DataConfig) -> DataConfig:
    """The same pictures; of a stream without captions and labels, which then need not be there."""
    if not config.is_stream:
        return config
    none: dict[str, Any] = {"caption_column": None, "caption_template": None, "label_column": None}
    mix = config.mix and {name: replace(part, **none) for name, part in config.mix.items()}
    return replace(config, mix=mix, class_names=None, caption_weights=None, more_caption_templates=[], **none)

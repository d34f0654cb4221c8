"""What a row of a stream is to training: whether it is wanted, its picture, its caption, its label."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tarflow.data.captions import columns_of, fill, keep, readable_names
from tarflow.data.config import DataConfig
from tarflow.data.folder import flattened, is_held_out, read_image
from tarflow.data.images import background_colour, fit, nearest_size
from tarflow.data.stream.shards import PICTURE, Shards, has_own_split
from tarflow.data.stream.tar import BROKEN, KEY

#: Sets what is mirrored apart from what captions draw of the same numbers.
MIRRORED = 1


@dataclass(frozen=True)
class Row:
    """One row of a stream.

    Attributes:
        values: by column.
        source, shard, number: the stream among several, its shard, and the row's place in that.
        turn: the pass over the data.
        place: key and shard in words.
    """

    values: dict[str, Any]
    source: int
    shard: int
    number: int
    turn: int
    place: str


class Classes:
    """How the values of a stream's label column stand for classes, which must be known before the last row is seen.

    Args:
        config: of the stream.
        named: the classes that the data itself names.

    Raises:
        ValueError: if nobody names the classes.
    """

    def __init__(self, config: DataConfig, named: list[str] | None):
        self.column, given = config.label_column, config.class_names
        if named is None and given is None:
            raise ValueError(
                f"data.label_column is {self.column!r}, but a stream does not tell its classes before it is read to its "
                "end: name them all by data.class_names"
            )
        numbered = isinstance(given, dict) and set(given) == {str(number) for number in range(len(given))}
        if named is not None:
            self.values = named
        elif isinstance(given, dict):
            self.values = sorted(given, key=int) if numbered else sorted(given)
        else:
            self.values = [str(name) for name in given or ()]
        self.names = readable_names(self.values, given)
        self.numbers = {value: number for number, value in enumerate(self.values)}
        self.texts_only = isinstance(given, dict) and not numbered and named is None

    def number(self, value: Any, place: str) -> int:
        """The class of a row's value.

        Raises:
            ValueError: that names it, if it is none of the classes.
        """
        if isinstance(value, str) and value in self.numbers:
            return self.numbers[value]
        whole = isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer()
        if whole and self.texts_only and str(int(value)) in self.numbers:  # of a dictionary by the column's texts
            return self.numbers[str(int(value))]
        if whole and not self.texts_only and 0 <= value < len(self.values):
            return int(value)
        known = ", ".join(self.values[:10]) + (", …" if len(self.values) > 10 else "")
        raise ValueError(
            f"{place} has the label {value!r} in the column {self.column!r}, which is none of the {len(self.values)} "
            f"classes ({known}): add it to data.class_names, or leave such rows out with data.where"
        )


class RowReader:
    """Makes items of a stream's rows; each is a pure function of the row and the pass.

    Args:
        config: of the stream.
        split: "train" or "validation".
        shards: of the stream.
        seed: of captions and backgrounds.
        sizes: height and width of the pictures, of which the nearest is taken.
        mirrored: mirror half of the pictures.

    Raises:
        ValueError: if its classes are not known.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        shards: Shards,
        seed: int,
        sizes: Sequence[tuple[int, int]],
        mirrored: bool = False,
    ):
        self.config, self.split, self.seed, self.sizes, self.mirrored = config, split, seed, list(sizes), mirrored
        self.classes = None if config.label_column is None else Classes(config, shards.classes)
        self.by_hash = not has_own_split(config)
        column = config.caption_column or "text"
        self.has_captions = bool(config.caption_column or config.caption_template)
        self.ways = [config.caption_template or "{" + column + "}", *config.more_caption_templates]
        self.weights = np.array(config.caption_weights or [1.0] * len(self.ways))

    def wanted(self, row: Row) -> bool:
        """Whether a row is of this split, and what ``where`` asks for.

        Raises:
            ValueError: if a column is missing, or the row cannot be read.
        """
        if BROKEN in row.values:
            raise ValueError(f"{row.place}: {row.values[BROKEN]}")
        if self.config.where:
            try:
                if not keep(row.values, self.config):
                    return False
            except ValueError as error:
                raise ValueError(f"{row.place}: {error}") from error
        if not self.by_hash:
            return True
        return is_held_out(self._key(row), self.config.validation_fraction) == (self.split == "validation")

    def item(self, row: Row) -> dict[str, Any]:
        """``{"image": uint8 (3, H, W), "caption": str, "label": int, "key": str}``.

        Raises:
            ValueError: that names shard and key, if the picture cannot be read, or caption or label are missing.
        """
        item: dict[str, Any] = {"image": self.pixels(row, self.picture(row))}
        if self.has_captions:
            item["caption"] = self.caption(row)
        if self.classes is not None:
            item["label"] = self.label(row)
        return {**item, "key": row.place, "skipped": []}

    def label(self, row: Row) -> int:
        """A row's class.

        Raises:
            ValueError: that names shard and key, if there is none, or it is not known.
        """
        assert self.classes is not None
        return self.classes.number(self._value(row, str(self.config.label_column)), row.place)

    def picture(self, row: Row) -> Image.Image:
        """A row's picture as it is, upright.

        Raises:
            ValueError: that names shard and key, if it is not there or cannot be read.
        """
        content = row.values[PICTURE]
        if content is None:
            columns = ", ".join(sorted(name for name in row.values if not name.startswith("__")))
            apart = (
                "; files of one name must follow one another, as tar --sort=name packs them"
                if KEY in row.values
                else ""
            )
            raise ValueError(
                f"{row.place} has no picture in the column {self.config.image_column!r}; it has {columns}{apart}"
            )
        return read_image(lambda: content, row.place)

    def pixels(self, row: Row, picture: Image.Image) -> Tensor:
        """A row's picture on its background, uint8 (3, H, W) of the nearest size."""
        index = zlib.crc32(repr((row.source, row.shard, row.number)).encode())
        image = flattened(picture, background_colour(self.config.background, self.config.seed, index))
        image = fit(image, *nearest_size(self.sizes, image.height, image.width))
        found = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return found.flip(-1) if self.mirrored and mirrors(row, self.seed) else found

    def caption(self, row: Row) -> str:
        """The caption that a row has in its pass; of held-out rows always the first."""
        rng = np.random.default_rng((self.seed, row.source, row.shard, row.number, row.turn))
        drawn = self.split == "train"
        values = {name: value for name, value in row.values.items() if name != PICTURE}
        if self.config.choose_from_lists:
            for name, value in values.items():
                if isinstance(value, list) and value:
                    values[name] = value[int(rng.integers(len(value))) if drawn else 0]
        way = self.ways[0]
        if drawn and len(self.ways) > 1:
            usable = [True, *(self._fits(way, values) for way in self.ways[1:])]
            weights = self.weights * usable
            way = self.ways[int(rng.choice(len(weights), p=weights / weights.sum()))]
        for column in columns_of(way):
            self._value(row, column)
        caption = fill(way, values, row.place)
        first, *others = caption.split(", ")
        if drawn and self.config.drop_caption_parts:
            others = [part for part in others if rng.random() >= self.config.drop_caption_parts]
        return ", ".join([first, *others])

    def captions(self, row: Row) -> list[str]:
        """All captions that a row may have, whole, that of held-out rows first; arguments and errors as of `caption`."""
        values = {name: value for name, value in row.values.items() if name != PICTURE}
        lists = [name for name, value in values.items() if isinstance(value, list) and value]
        longest = max((len(values[name]) for name in lists), default=1) if self.config.choose_from_lists else 1
        for column in columns_of(self.ways[0]):
            self._value(row, column)
        found: list[str] = []
        for number in range(longest):
            chosen = {name: values[name][number % len(values[name])] for name in lists} if longest > 1 else {}
            now = {**values, **chosen}
            ways = [self.ways[0], *(way for way in self.ways[1:] if self._fits(way, now))]
            found += [fill(way, now, row.place) for way in ways]
        return list(dict.fromkeys(found))

    def _fits(self, way: str, values: dict[str, Any]) -> bool:
        return all(values.get(column, "absent") not in ("", [], None) for column in columns_of(way))

    def _key(self, row: Row) -> str:
        column = self.config.key_column
        if column is not None:
            return str(self._value(row, column))
        return str(row.values.get(KEY, f"shard {row.shard}, row {row.number}"))

    def _value(self, row: Row, column: str) -> Any:
        if column not in row.values:
            columns = ", ".join(sorted(name for name in row.values if name != PICTURE))
            raise ValueError(f"{row.place} has no column {column!r}; it has {columns}")
        if row.values[column] is None:
            raise ValueError(f"{row.place} has no value in the column {column!r}")
        return row.values[column]


def mirrors(row: Row, seed: int) -> bool:
    """Whether a row is among the half that is mirrored in its pass."""
    rng = np.random.default_rng((seed, row.source, row.shard, row.number, row.turn, MIRRORED))
    return bool(rng.random() < 0.5)

"""Data sets that the Datasets library loads by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets

from tarflow.data.captions import keep, make_captions, readable_names, templates_of
from tarflow.data.config import DataConfig
from tarflow.data.folder import is_held_out, read_image, read_size
from tarflow.data.labels import Labels


class NamedDataset:
    """Map-style data set over named columns: item i is ``{"image": PIL, "caption": str, "label": int}``.

    Raises:
        ValueError: if the name cannot be loaded, a column is missing or of a type that does not fit, a label is missing
            or out of range, or (at an item) a picture cannot be read.
    """

    def __init__(self, config: DataConfig, split: str = "train"):
        self.config = config
        own_split = split == "validation" and config.validation_split is not None
        split_name = (config.validation_split if own_split else None) or config.train_split
        data = load_split(config, split_name)
        #: Of the data that was loaded, before a selection. It changes with the files.
        self.fingerprint = data._fingerprint
        self.labels: Labels | None = None
        self.class_names: tuple[str, ...] | None = None
        if config.label_column is not None:
            # The same numbers in both splits, whichever classes they have.
            training = load_split(config, config.train_split) if own_split else data
            self.labels = Labels.of_data(training, config)
            self.class_names = readable_names(self.labels.classes, config.class_names)
        data = with_undecoded_images(data, config)
        others = data.remove_columns([config.image_column])
        self.has_captions = bool(config.caption_column or config.caption_template)
        kept = [i for i, row in enumerate(others) if keep(row, config)] if config.where else list(range(len(data)))
        if config.validation_split is None:
            kept = [i for i in kept if is_held_out(str(i), config.validation_fraction) == (split == "validation")]
        self.data = data.select(kept)
        # Made once: to take columns away takes longer than to read a row.
        self.without_pictures = self.data.remove_columns([config.image_column])
        self.pictures = self.data.select_columns([config.image_column])
        if self.labels is not None:
            self.labels.check(self.data, split_name, kept)
        self.items: list[tuple[int, int]] | None = None  # rows with their ways to be described, if some have several
        if split != "validation" and config.more_caption_templates:
            rows = enumerate(self.without_pictures)
            self.items = [(i, way) for i, row in rows for way in range(len(templates_of(row, config)))]
        if not len(self.data) and split == "train":
            raise ValueError(f"no rows are left in {config.name!r} for the split {split_name!r}")

    def __len__(self) -> int:
        return len(self.data if self.items is None else self.items)

    def caption(self, index: int) -> str:
        row, way = self._place(index)
        return self._captions(self.without_pictures[row], row)[way]

    def _place(self, index: int) -> tuple[int, int]:
        """An item's row, and which of its captions it has."""
        return (index, 0) if self.items is None else self.items[index]

    def _captions(self, row: dict[str, Any], index: int) -> list[str]:
        return make_captions(row, self.config, f"{self.config.name}[{index}]")

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a picture, from the head of its file."""
        index, _ = self._place(index)
        name = f"{self.config.name}[{index}]"
        value = self._value(self.pictures[index], name)
        return read_size(lambda: io.BytesIO(file_bytes(value)), value.get("path") or name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, way = self._place(index)
        row, name = self.data[index], f"{self.config.name}[{index}]"
        value = self._value(row, name)
        item: dict[str, Any] = {"image": read_image(lambda: file_bytes(value), value.get("path") or name)}
        if self.has_captions:
            item["caption"] = self._captions(row, index)[way]
        if self.labels is not None:
            item["label"] = self.labels.number(row[self.config.label_column])
        return item

    def facts(self, count: int) -> dict[str, str]:
        """What tells whether the first ``count`` items are those of another time: all of them come from these files."""
        return {"data": self.fingerprint}

    def _value(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        """The picture of a row: its file's bytes or path."""
        value = row[self.config.image_column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ValueError(f"{name} has no image")
        return value


def load_split(config: DataConfig, split: str) -> datasets.Dataset:
    """One split of a data set, with all columns that the settings name.

    Raises:
        ValueError: if it cannot be loaded, or a column is missing.
    """
    try:
        data = datasets.load_dataset(config.name, data_files=config.data_files, split=split)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load the data set {config.name!r}, split {split!r}: {reason}") from error
    for option in ("image_column", "caption_column", "label_column"):
        column = getattr(config, option)
        if column is not None and column not in data.column_names:
            columns = ", ".join(data.column_names)
            raise ValueError(f"data.{option} is {column!r}, but {config.name!r} has the columns {columns}")
    return data


def with_undecoded_images(data: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """The data with its column of pictures, or of their files' bytes or paths, as dicts of bytes and path.

    Raises:
        ValueError: if the column holds something else.
    """
    try:
        return data.cast_column(config.image_column, datasets.Image(decode=False))
    except Exception as error:  # whatever it is, the column holds no pictures
        feature = data.features[config.image_column]
        raise ValueError(
            f"data.image_column is {config.image_column!r}, but that column of {config.name!r} holds no pictures: its "
            f"type is {feature}"
        ) from error


def file_bytes(value: dict[str, Any]) -> bytes:
    """A picture file's bytes, from where Datasets keeps them."""
    return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]

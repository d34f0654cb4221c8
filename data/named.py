"""Data sets that the Datasets library loads by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets

from tarflow.data.config import DataConfig
from tarflow.data.folder import is_held_out, keep, make_captions, read_image, read_size, readable_names


class NamedDataset:
    """Map-style data set over named columns: item i is ``{"image": PIL, "caption": str, "label": int}``.

    Raises:
        ValueError: if the name cannot be loaded, a column is missing, or (at an item) a picture cannot be read or a
            label is out of range.
    """

    def __init__(self, config: DataConfig, split: str = "train"):
        self.config = config
        own_split = split == "validation" and config.validation_split is not None
        split_name = config.validation_split if own_split else config.train_split
        try:
            data = datasets.load_dataset(config.name, data_files=config.data_files, split=split_name)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"cannot load the data set {config.name!r}, split {split_name!r}: {reason}") from error
        wanted = {"image_column": config.image_column, "caption_column": config.caption_column}
        wanted["label_column"] = config.label_column
        for option, column in wanted.items():
            if column is not None and column not in data.column_names:
                columns = ", ".join(data.column_names)
                raise ValueError(f"data.{option} is {column!r}, but {config.name!r} has the columns {columns}")
        feature = data.features[config.label_column] if config.label_column else None
        self.class_names: tuple[str, ...] | None = None
        if config.label_column is not None:
            classes = list(getattr(feature, "names", []))
            if not classes:
                classes = [str(i) for i in range(max(data[config.label_column]) + 1)]
            self.class_names = readable_names(classes, config.class_names)
        if isinstance(data.features[config.image_column], datasets.Image):
            data = data.cast_column(config.image_column, datasets.Image(decode=False))
        others = data.remove_columns([config.image_column])
        self.has_captions = bool(config.caption_column or config.caption_template)
        kept = [i for i, row in enumerate(others) if keep(row, config)] if config.where else list(range(len(data)))
        if config.validation_split is None:
            kept = [i for i in kept if is_held_out(str(i), config.validation_fraction) == (split == "validation")]
        self.data = data.select(kept)
        self.variants = 1 if split == "validation" else 1 + len(config.more_caption_templates)
        if not len(self.data) and split == "train":
            raise ValueError(f"no rows are left in {config.name!r} for the split {split_name!r}")

    def __len__(self) -> int:
        return len(self.data) * self.variants

    def caption(self, index: int) -> str:
        index, variant = divmod(index, self.variants)
        row = self.data.remove_columns([self.config.image_column])[index]
        return self._caption(row, index, variant)

    def _caption(self, row: dict[str, Any], index: int, variant: int) -> str:
        captions = make_captions(row, self.config, f"{self.config.name}[{index}]")
        return captions[variant if variant < len(captions) else 0]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a picture, from the head of its file."""
        index = index // self.variants
        name = f"{self.config.name}[{index}]"
        value = self._value(self.data.select_columns([self.config.image_column])[index], name)
        if isinstance(value, dict):
            return read_size(lambda: io.BytesIO(file_bytes(value)), value.get("path") or name)
        return value.height, value.width

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, variant = divmod(index, self.variants)
        row, name = self.data[index], f"{self.config.name}[{index}]"
        value = self._value(row, name)
        if isinstance(value, dict):
            value = read_image(lambda: file_bytes(value), value.get("path") or name)
        item: dict[str, Any] = {"image": value}
        if self.has_captions:
            item["caption"] = self._caption(row, index, variant)
        if self.class_names is not None:
            label = row[self.config.label_column]
            if not 0 <= label < len(self.class_names):
                raise ValueError(f"the label of {name} is {label}, expected 0 to {len(self.class_names) - 1}")
            item["label"] = int(label)
        return item

    def _value(self, row: dict[str, Any], name: str) -> Any:
        """The picture of a row: a dict with its file's bytes or path, or a decoded picture."""
        value = row[self.config.image_column]
        if value is None:
            raise ValueError(f"{name} has no image")
        return value


def file_bytes(value: dict[str, Any]) -> bytes:
    """A picture file's bytes, from where Datasets keeps them."""
    return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]

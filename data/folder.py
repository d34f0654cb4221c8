"""Pictures of a local folder or zip archive: class folders, captions in ``metadata.jsonl``, or neither."""

from __future__ import annotations

import io
import json
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from PIL import ExifTags, Image, UnidentifiedImageError

from tarflow.data.config import DataConfig
from tarflow.data.files import Files

SPLIT_FOLDERS = {"train": ("train",), "validation": ("val", "validation", "test")}


@dataclass(frozen=True)
class Row:
    """One picture: the file's name, and the caption and label that belong to it.

    ``repeats`` is its first caption if this is another one for the same picture.
    """

    name: str
    caption: str | None = None
    label: int | None = None
    repeats: str | None = None


class ImageFolder:
    """Map-style data set of a folder's pictures: item i is ``{"image": PIL, "caption": str, "label": int}``.

    ``caption`` and ``label`` are there only if the folder has them. See `DataConfig` for what the options mean.

    Raises:
        ValueError: if the folder is missing or has no pictures, if captions are missing for some of them, or (at an
            item) if a picture cannot be read.
    """

    def __init__(self, config: DataConfig, split: str = "train"):
        self.files = Files(config.path or "")
        self.image_column = config.image_column
        images = self.files.images()
        if not images:
            raise ValueError(f"no images found in {config.path!r}: expected files such as .png, .jpg or .webp")
        self.class_names: tuple[str, ...] | None = None
        if "metadata.jsonl" in self.files.names:
            rows = self._captioned_rows(images, config)
        else:
            if config.caption_column or config.caption_template:
                raise ValueError(f"captions are asked for, but {config.path!r} has no metadata.jsonl at its root")
            rows = self._labelled_rows(images, config)
        self.rows = self._split(rows, split, config.validation_fraction)
        if not self.rows and split == "train":
            raise ValueError(f"no images are left in {config.path!r} for the split {split!r} with where={config.where}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_captions(self) -> bool:
        return bool(self.rows) and self.rows[0].caption is not None

    def caption(self, index: int) -> str | None:
        return self.rows[index].caption

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a picture, from the head of its file."""
        name = self.rows[index].name
        return read_size(lambda: self.files.open(name), f"{self.files.path}/{name}")

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        item: dict[str, Any] = {"image": read_image(lambda: self.files.read(row.name), f"{self.files.path}/{row.name}")}
        if row.caption is not None:
            item["caption"] = row.caption
        if row.label is not None:
            item["label"] = row.label
        return item

    def _captioned_rows(self, images: list[str], config: DataConfig) -> list[Row]:
        records = []
        for number, line in enumerate(self.files.read("metadata.jsonl").decode("utf-8").splitlines(), start=1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                    records[-1]["file_name"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"line {number} of metadata.jsonl in {config.path!r} is no JSON object with a file_name"
                    ) from error
        unnamed = sorted(set(images) - {record["file_name"] for record in records})
        absent = sorted({record["file_name"] for record in records} - set(images))
        if unnamed:
            raise ValueError(
                f"captions are missing for {len(unnamed)} of {len(images)} images in {config.path!r}, first "
                f"{unnamed[0]!r}: add them to metadata.jsonl or remove the images"
            )
        if absent:
            raise ValueError(
                f"metadata.jsonl in {config.path!r} names {len(absent)} absent images, first {absent[0]!r}"
            )
        rows = []
        for record in records:
            if keep(record, config):
                first, *others = make_captions(record, config, record["file_name"])
                rows += [Row(record["file_name"], caption=first)]
                rows += [Row(record["file_name"], caption=other, repeats=first) for other in others]
        return rows

    def _labelled_rows(self, images: list[str], config: DataConfig) -> list[Row]:
        splits = {folder for folders in SPLIT_FOLDERS.values() for folder in folders}
        tops = {name.split("/")[0] for name in images if "/" in name}
        depth = 1 if tops and tops <= splits else 0  # below the split folders
        folders = [name.split("/")[depth] if name.count("/") > depth else "" for name in images]
        if "" in folders:
            if len(set(folders)) > 1:
                raise ValueError(f"{config.path!r} mixes class folders with images outside of them, {images[0]!r}")
            return [Row(name) for name in images]
        classes = sorted(set(folders))
        self.class_names = readable_names(classes, config.class_names)
        return [Row(name, label=classes.index(folder)) for name, folder in zip(images, folders, strict=True)]

    @staticmethod
    def _split(rows: list[Row], split: str, fraction: float) -> list[Row]:
        if split == "validation":
            rows = [row for row in rows if row.repeats is None]
        tops = {row.name.split("/")[0] for row in rows}
        if any(tops & set(folders) for folders in SPLIT_FOLDERS.values()):
            return [row for row in rows if row.name.split("/")[0] in SPLIT_FOLDERS[split]]
        keys = [row.repeats or row.caption or row.name for row in rows]
        held_out = split == "validation"
        return [row for row, key in zip(rows, keys, strict=True) if is_held_out(key, fraction) == held_out]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a caption or file name belongs to the held-out fraction: the same on every machine."""
    return zlib.crc32(key.encode("utf-8")) < fraction * 2**32


def keep(record: dict, config: DataConfig) -> bool:
    """Whether a row has one of the wanted values in every column of ``where``."""
    for column, values in (config.where or {}).items():
        if column not in record:
            raise ValueError(f"data.where names the column {column!r}, but the data has {', '.join(sorted(record))}")
        if record[column] not in values:
            return False
    return True


def make_captions(record: dict, config: DataConfig, name: str) -> list[str]:
    """The captions of one row: by template or column ("text" if neither is given), then others of further templates."""
    column = config.caption_column or "text"
    captions = [fill(config.caption_template or "{" + column + "}", record, name)]
    for template in config.more_caption_templates:
        columns = [part for _, part, _, _ in string.Formatter().parse(template) if part]
        if any(record.get(part, "absent") in ("", [], None) for part in columns):
            continue
        captions.append(fill(template, record, name))
    return captions


def fill(template: str, record: dict, name: str) -> str:
    """A template with the values of a row; lists are joined by commas."""
    texts = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in record.items()}
    try:
        caption = texts[template[1:-1]] if template[1:-1] in texts else template.format(**texts)
    except KeyError as error:
        columns = ", ".join(sorted(record))
        raise ValueError(f"the row of {name!r} has no column {error} for its caption; it has {columns}") from error
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"the caption of {name!r} is {caption!r}, expected a text that is not empty")
    return caption


def readable_names(classes: list[str], names: dict[str, str] | list[str] | None) -> tuple[str, ...]:
    """Names of the classes, from a mapping or a list of the same length."""
    if names is None:
        return tuple(classes)
    if isinstance(names, dict):
        if missing := [name for name in classes if name not in names]:
            raise ValueError(f"data.class_names lacks the classes {', '.join(missing)}")
        return tuple(names[name] for name in classes)
    if len(names) != len(classes):
        raise ValueError(f"data.class_names has {len(names)} names, but the data has {len(classes)} classes")
    return tuple(names)


def read_image(read: Callable[[], bytes], name: str) -> Image.Image:
    """Read and decode a picture whole; an unreadable one is a ValueError with its name."""
    try:
        image = Image.open(io.BytesIO(read()))
        image.load()
    except Exception as error:
        raise unreadable(name, error) from error
    return image


def read_size(open_file: Callable[[], IO[bytes]], name: str) -> tuple[int, int]:
    """Height and width of a picture when upright, without decoding it; an unreadable one is a ValueError."""
    try:
        with open_file() as file, Image.open(file) as image:
            width, height = image.size
            # The base class's method, as that of PNG decodes the picture. TIFF has turned the size by itself.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
            return (width, height) if orientation >= 5 and image.format != "TIFF" else (height, width)
    except Exception as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> ValueError:
    """The error of a picture that cannot be read."""
    # This class's own message names a buffer, not the file.
    known = not isinstance(error, UnidentifiedImageError)
    return ValueError(f"cannot read the image {name}: {error if known else 'it is no picture of a known format'}")

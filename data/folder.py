"""Pictures of a local folder or zip archive: class folders, captions in ``metadata.jsonl``, or neither."""

from __future__ import annotations

import gc
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from tarflow.common.modes import check_mode, flatten
from tarflow.common.words import counted
from tarflow.data.captions import METADATA, keep, make_captions, read_metadata, readable_names
from tarflow.data.config import DataConfig
from tarflow.data.files import Files, archive_length, hash_of, shown
from tarflow.data.formats import PICTURE_SUFFIXES, count_suffixes, suffix
from tarflow.data.layout import Placed, place_pictures

#: Files of an archive that are listed in a tenth of a second.
FEW_FILES = 10_000


class Row(NamedTuple):
    """One picture: the file's name, and the caption and label that belong to it.

    Attributes:
        repeats: its first caption, if this is another way to say it.
        split: that its folder says; None if there are no split folders.
        key: decides whether it is held out where there are none: the first caption of the file, or else its name.
    """

    name: str
    caption: str | None = None
    label: int | None = None
    repeats: str | None = None
    split: str | None = None
    key: str = ""


class ImageFolder:
    """Map-style data set of a folder's pictures: item i is ``{"image": PIL, "caption": str, "label": int}``.

    ``caption`` and ``label`` are there only if the folder has them. See `DataConfig` for what the options mean, and
    `tarflow.data.layout` for what the folders do.

    Raises:
        ValueError: if the folder is missing or has no pictures, if it is not clear what its folders mean, if captions
            are missing for some pictures, or (at an item) if a picture cannot be read.
    """

    def __init__(self, config: DataConfig, split: str = "train"):
        self.config = config
        self.class_names: tuple[str, ...] | None = None
        self.files = Files(str(config.path or ""))
        with paused_collection():
            self.every = self._all_rows(config)
        self._choose(split)

    def of_split(self, split: str) -> ImageFolder:
        """Another split of the same listing, so that millions of names are there once.

        Raises:
            ValueError: if it has no pictures, but is for training.
        """
        other = copy(self)
        other._choose(split)
        return other

    def _choose(self, split: str) -> None:
        config, rows = self.config, self.every
        self.rows = choose_split(rows, split, config.validation_fraction)
        if not self.rows and split == "train":
            only = " (its split folders are for validation)" if rows and rows[0].split else ""
            raise ValueError(
                f"no images are left in {config.path!r} for the split {split!r}{only} with where={config.where} and "
                f"validation_fraction={config.validation_fraction:g}, which holds out all pictures of a caption, or none"
            )

    def _all_rows(self, config: DataConfig) -> list[Row]:
        """The pictures of all splits."""
        images = usable_images(self.files, skip=config.on_error == "skip")
        places = place_pictures(images, str(config.path), config.split_folders)
        if any(name.endswith(METADATA) and name.split("/")[-1] == METADATA for name in self.files.names):
            return self._captioned_rows(places, images, config)
        if config.caption_column or config.caption_template:
            raise ValueError(f"captions are asked for, but {config.path!r} has no metadata.jsonl")
        if config.where:
            raise ValueError(
                f"data.where chooses rows of a metadata.jsonl, but {config.path!r} has none: give --data.where null"
            )
        return self._labelled_rows(places, config)

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
        return read_size(lambda: self.files.open(name), self.files.place(name))

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        item: dict[str, Any] = {"image": read_image(lambda: self.files.read(row.name), self.files.place(row.name))}
        if row.caption is not None:
            item["caption"] = row.caption
        if row.label is not None:
            item["label"] = row.label
        return item

    def facts(self, count: int) -> dict[str, str]:
        """Hashes by which a change of the first ``count`` items is noticed: of file names, sizes (in archives also
        contents), times, captions and labels."""
        rows = self.rows[:count]
        about = [self.files.facts(row.name) for row in rows]
        return {
            "files": hash_of(row.name for row in rows),
            "sizes": hash_of((size, checksum) for size, checksum, _ in about),
            "times": hash_of(time for _, _, time in about),
            "captions": hash_of(row.caption for row in rows),
            "labels": hash_of(row.label for row in rows),
        }

    def _captioned_rows(self, places: list[Placed], images: list[str], config: DataConfig) -> list[Row]:
        splits = {place.name: place.split for place in places}
        left_out = [*self.files.unreadable_images(), *self.files.other_images(), *(set(images) - set(splits))]
        rows: list[Row] = []
        keys: dict[str, str] = {}  # by the file's name, so that all captions of a picture are in one split
        seen: set[int] = set()  # hashes, as captions of millions of pictures take much memory
        equal = 0
        for record in read_metadata(self.files, list(splits), left_out):
            if keep(record, config):
                name = record["file_name"]
                first, *others = make_captions(record, config, name)
                line = hash((name, first, *others))
                if line in seen:
                    equal += 1
                    continue
                seen.add(line)
                row = Row(name, first, split=splits[name], key=keys.setdefault(name, first))
                rows += [row, *(Row(name, other, None, first, row.split, row.key) for other in others)]
        if equal:
            say_once(
                f"{config.path}: {counted(equal, 'line')} of {METADATA} said again what others say, and count once"
            )
        return rows

    def _labelled_rows(self, places: list[Placed], config: DataConfig) -> list[Row]:
        outside = [place.name for place in places if place.folder is None]
        classes = sorted({place.folder for place in places if place.folder is not None})
        if outside and classes:
            raise ValueError(
                f"{config.path!r} mixes class folders with images outside of them, {shown(outside[0])!r}: move these "
                "images elsewhere, or all into one folder"
            )
        if len(classes) == 1 and len({place.deeper for place in places}) > 1:
            loose = next(place.name for place in places if not place.deeper)
            raise ValueError(
                f"{config.path!r} has one folder {shown(classes[0])!r} with images both in it, {shown(loose)!r}, and in "
                "folders below: move either elsewhere, so that it is clear what is a class"
            )
        if outside:
            return [Row(place.name, split=place.split, key=place.name) for place in places]
        for name in classes:
            if shown(name) != name:
                raise ValueError(f"the class folder {shown(name)!r} in {config.path!r} has a name that is no UTF-8")
        self.class_names = readable_names(classes, config.class_names)
        labels = {folder: label for label, folder in enumerate(classes)}
        return [Row(p.name, label=labels[p.folder or ""], split=p.split, key=p.name) for p in places]


@contextmanager
def paused_collection() -> Iterator[None]:
    """Do not look for garbage meanwhile: the many objects that are made, and stay, would be looked through again and
    again, which takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def usable_images(files: Files, skip: bool = False) -> list[str]:
    """Names of a folder's pictures; what is left out is said.

    Args:
        files: the folder or archive.
        skip: leave out and count pictures of formats that cannot be read here, instead of refusing them.

    Raises:
        ValueError: if there are no pictures, or some of formats that need a plug-in.
    """
    images, closed, others = files.images(), files.unreadable_images(), files.other_images()
    where = str(files.path)
    if closed and not skip:
        raise ValueError(
            f"{len(closed)} images in {where!r} have formats that cannot be read here ({count_suffixes(closed)}), first "
            f"{shown(closed[0])!r}: install Pillow's plug-in for them, convert them, or move them elsewhere"
        )
    if not images:
        said = f", and {count_suffixes(closed + others)} are not read here" if closed or others else ""
        raise ValueError(f"no images found in {where!r}: expected files such as .png, .jpg or .webp{said}")
    if closed or others:
        say_once(f"{where}: {count_suffixes(closed + others)} files are left out, as their formats are not read here")
    return images


def check_pictures(config: DataConfig) -> None:
    """Refuse a folder or archive without pictures, or a file that is no archive. A folder is listed up to its first
    picture for that, an archive if it has few files.

    Raises:
        ValueError: that names it.
    """
    place = Path(str(config.path)).expanduser()
    if place.is_dir():
        for folder, inner, names in os.walk(place):
            links = any(Path(folder, name).is_symlink() for name in inner)  # what they lead to is not listed here
            if links or any(suffix(name) in PICTURE_SUFFIXES for name in names):
                return
    elif zipfile.is_zipfile(place) and archive_length(place) > FEW_FILES:
        return
    usable_images(Files(str(config.path)), skip=config.on_error == "skip")


@cache
def say_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def choose_split(rows: list[Row], split: str, fraction: float) -> list[Row]:
    """The rows of a split: by their folders, or else by a hash."""
    if split == "validation":
        rows = [row for row in rows if row.repeats is None]
    own = {row.split for row in rows if row.split}
    if own and own != {"train"}:
        return [row for row in rows if row.split == split]
    return [row for row in rows if is_held_out(row.key, fraction) == (split == "validation")]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a caption or file name belongs to the held-out fraction: the same on every machine."""
    return zlib.crc32(key.encode("utf-8", "surrogateescape")) < fraction * 2**32


def read_image(read: Callable[[], bytes], name: str) -> Image.Image:
    """Read and decode a picture whole; an unreadable one, or one whose white is not known, is a ValueError with its
    name."""
    try:
        image = Image.open(io.BytesIO(read()))
        image.load()
        check_mode(image)
        image.filename = name  # for errors of what is done with it
    except Exception as error:
        raise unreadable(name, error) from error
    return image


def flattened(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """`flatten` of what `read_image` read: whatever fails, such as damaged EXIF data, is a ValueError with its name."""
    try:
        return flatten(image, background)
    except Exception as error:
        raise unreadable(getattr(image, "filename", "") or "without a name", error) from error


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

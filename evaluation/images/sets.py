"""Sets of pictures to be evaluated: folders, zip archives, ``.npz`` arrays, and the data of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tarflow.data.config import DataConfig
from tarflow.data.files import Files
from tarflow.data.folder import ImageFolder, flattened, read_image, read_size, unreadable, usable_images
from tarflow.data.images import Images, fit
from tarflow.data.layout import SPLIT_FOLDERS, place_pictures
from tarflow.data.subset import check_not_empty
from tarflow.evaluation.images.arrays import open_array, read_whole
from tarflow.evaluation.images.conversions import Watched, conversions_of
from tarflow.evaluation.images.image_set import READERS, REPLACED, ImageSet
from tarflow.evaluation.images.streams import StreamImages

#: The name of generated pictures that are kept as one array in a folder.
ARRAY_NAME = "samples.npz"
CHUNK = 2**20


class FileImages(ImageSet):
    """The picture files below a folder or in a zip archive, sorted by name.

    Args:
        path: of the folder or archive.
        split: take only the folder of this split; None takes all.
        image_size: resize and centre-crop to this side; None wants pictures that all have one size.
        num: take the first so many.

    Raises:
        ValueError: if there are no pictures, too few, or of several sizes.
    """

    def __init__(self, path: str, split: str | None = None, image_size: int | None = None, num: int | None = None):
        self.files, self.image_size = Files(path), image_size
        self.names = usable_images(self.files)
        if split is not None:
            places = place_pictures(self.names, path)
            if not places[0].split:
                raise ValueError(f"{path!r} has no folders train or val, so it has no split {split!r}")
            self.names = [place.name for place in places if place.split == split]
            if not self.names:
                raise ValueError(f"{path!r} has no pictures of the split {split!r}")
        self.names = self.names[: limit(len(self.names), num, path)]
        size = (image_size, image_size) if image_size is not None else self._common_size()
        super().__init__(str(path), len(self.names), size)

    def _common_size(self) -> tuple[int, int]:
        with ThreadPoolExecutor(READERS) as pool:
            sizes = list(pool.map(self._file_size, self.names))
        for name, other in zip(self.names, sizes, strict=True):
            if other != sizes[0]:
                first, second = (f"{height}×{width}" for height, width in (sizes[0], other))
                raise ValueError(
                    f"the pictures of {str(self.files.path)!r} have several sizes: {self.names[0]} has {first}, "
                    f"{name} has {second} (height × width); give an image_size to fit them to"
                )
        return sizes[0]

    def _file_size(self, name: str) -> tuple[int, int]:
        return read_size(lambda: self.files.open(name), self.files.place(name))

    def indices(self) -> list[int]:
        """The numbers that generated pictures have as names; positions for others."""
        stems = [Path(name).stem for name in self.names]
        return [int(stem) for stem in stems] if all(stem.isdecimal() for stem in stems) else super().indices()

    def _read(self, index: int) -> tuple[Tensor, list[str]]:
        name = self.names[index]
        content = read_file(self.files, name)
        image = read_image(lambda: content, self.files.place(name))
        conversions = conversions_of(image, content)
        image = flattened(image, (255, 255, 255))
        return to_tensor(image if self.image_size is None else fit(image, *self.size)), conversions

    def _hash_content(self, digest: Any) -> None:
        hash_files(digest, self.files, self.names)


class ArrayImages(ImageSet):
    """The array ``arr_0`` (N, H, W, 3) uint8 of an ``.npz`` file, as ADM's evaluator reads it; read piece by piece.

    Raises:
        ValueError: if it is no such file, or the array has another type or layout.
    """

    def __init__(self, path: str, image_size: int | None = None, num: int | None = None):
        self.path = Path(path).expanduser()
        with open_array(self.path) as (_, shape):
            length, height, width, _ = shape
        if image_size not in (None, height) or image_size not in (None, width):
            raise ValueError(f"{str(path)!r} has pictures of {height}×{width}, but the image_size is {image_size}")
        super().__init__(str(path), limit(length, num, str(path)), (height, width))

    def batches(self, batch_size: int, process: int = 0, processes: int = 1) -> Iterator[Tensor]:
        """As of `ImageSet`."""
        with open_array(self.path) as (file, shape):
            picture, start = int(np.prod(shape[1:])), file.tell()
            for first in range(process * batch_size, len(self), processes * batch_size):
                count = min(batch_size, len(self) - first)
                content = read_whole(file, count * picture, self.path, start + first * picture)
                pixels = np.frombuffer(content, dtype=np.uint8)
                yield torch.from_numpy(pixels.reshape(count, *shape[1:]).copy()).permute(0, 3, 1, 2).contiguous()

    def _hash_content(self, digest: Any) -> None:
        with open_array(self.path) as (file, shape):
            left = len(self) * int(np.prod(shape[1:]))
            while left:
                digest.update(read_whole(file, min(CHUNK, left), self.path))
                left -= min(CHUNK, left)


class DataImages(ImageSet):
    """The pictures of a data section, as training sees them, but never mirrored.

    Raises:
        ValueError: if the split is empty, or endless and not limited.
    """

    def __init__(self, config: DataConfig, split: str = "train", num: int | None = None):
        self.data = Images(config, split)
        self.watched = Watched(self.data.source)
        self.data.source = self.watched
        name = f"{config.source} {config.path or config.name or ''}".strip() + f", {split}"
        config.check_count(num, "num")
        check_not_empty(len(self.data), split)
        super().__init__(name, limit(len(self.data), num, name), (config.image_size, config.image_size))

    def captions(self) -> list[str]:
        """Of all pictures.

        Raises:
            ValueError: if there are none.
        """
        if not self.data.has_captions:
            raise ValueError("the data has no captions")
        return [self.data.caption(index) or "" for index in range(len(self))]

    def _read(self, index: int) -> tuple[Tensor, list[str]]:
        item = self.data[index]
        conversions = self.watched.conversions.pop(index, [])
        return item["image"], conversions + [REPLACED] * bool(item["skipped"])

    def _hash_content(self, digest: Any) -> None:
        source, config = self.watched.source, self.data.config
        if isinstance(source, ImageFolder) and config.background != "random":
            digest.update(repr((config.image_size, config.background, config.on_error)).encode())
            hash_files(digest, source.files, [row.name for row in source.rows[: len(self)]])
        else:  # what a builder or a random background makes of the files is known from the pixels only
            for batch in self.batches(64):
                digest.update(batch.numpy().tobytes())


def open_images(
    source: str | Path | DataConfig, split: str | None = None, image_size: int | None = None, num: int | None = None
) -> ImageSet:
    """The pictures of a path or of a data section.

    Args:
        source: a folder (searched to its depth) or zip archive of pictures, an ``.npz`` with ``arr_0`` uint8
            (N, H, W, 3), a folder with such a ``samples.npz``, or a data section, which has its own image_size.
        split: "train" or "validation"; of a path, the folders of that name; None takes all (of a section, "train").
        image_size: side to which the pictures of a path are fitted; None wants pictures of one size.
        num: take the first so many; None takes all.

    Raises:
        ValueError: in one sentence, for whatever cannot be read.
    """
    if split not in (None, *SPLIT_FOLDERS):
        raise ValueError(f"the split must be 'train' or 'validation', got {split!r}")
    if isinstance(source, DataConfig):
        if image_size is not None:
            raise ValueError("image_size fits the pictures of a path; a data section has its own, data.image_size")
        return (StreamImages if source.is_stream else DataImages)(source, split or "train", num)
    path = Path(source).expanduser()
    if path.is_dir() and (path / ARRAY_NAME).is_file():
        path = path / ARRAY_NAME
    if path.suffix == ".npz":
        if split is not None:
            raise ValueError(f"{str(path)!r} is one array without splits, but the split {split!r} is asked for")
        return ArrayImages(str(path), image_size, num)
    return FileImages(str(path), split, image_size, num)


def limit(length: int, num: int | None, name: str) -> int:
    """How many of ``length`` pictures to take when ``num`` are wanted."""
    if num is not None and not 1 <= num <= length:
        raise ValueError(f"{num} pictures are asked for, but {name!r} has {length}")
    return length if num is None else num


def read_file(files: Files, name: str) -> bytes:
    """The bytes of a file; whatever goes wrong, a damaged archive too, is a ValueError with its name."""
    try:
        return files.read(name)
    except Exception as error:
        raise unreadable(files.place(name), error) from error


def hash_files(digest: Any, files: Files, names: list[str]) -> None:
    """Feed names, sizes and bytes of some files to a hash, one file after the other."""
    for name in names:
        content = read_file(files, name)
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

"""The shards of a stream, each of which is read from its beginning: tar files, and those of the Datasets library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from tarflow.data.config import DataConfig
from tarflow.data.stream.tar import BROKEN, is_picture, tar_rows
from tarflow.data.stream.urls import FINAL, UnreachableError, check_there, files_expanded, listed, opened, reason_of

#: Lanes of a stream that is read by one process alone.
USUAL_LANES = 8
#: The column that a picture's bytes have in every row.
PICTURE = "__picture__"


class Shards(Protocol):
    """Shards by number: their ``names``, for messages, and the names of the ``classes`` that the data itself tells, None if it
    tells none.
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def classes(self) -> list[str] | None: ...

    def rows(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        """Rows of a shard from number ``start`` on, always in the same order; a picture's bytes are in `PICTURE`, which
        is None where there is none.

        Raises:
            ValueError: that names the shard, if it cannot be read to its end.
        """


def open_shards(config: DataConfig, split: str) -> Shards:
    """The shards of one stream that have a split's rows, perhaps among others (see `has_own_split`).

    Raises:
        ValueError: if there are none, or they cannot be reached.
    """
    own = split == "validation" and has_own_split(config)
    if config.source == "webdataset":
        return TarShards(str(config.validation_path if own else config.path), config)
    return TableShards(str((own and config.validation_split) or config.train_split), config)


def has_own_split(config: DataConfig) -> bool:
    """Whether held-out rows lie in shards of their own."""
    return (config.validation_path if config.source == "webdataset" else config.validation_split) is not None


class TarShards:
    """Tar files in the layout of WebDataset, see `tar_rows`; nothing is kept on disk."""

    classes: list[str] | None = None

    def __init__(self, pattern: str, config: DataConfig):
        self.names = listed(pattern)
        self.column = config.image_column
        if config.on_error == "raise":
            check_there(self.names)

    def rows(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        for row in islice(tar_rows(self.names[shard]), start, None):
            row[PICTURE] = None
            pictures = self._pictures(row)
            if len(pictures) > 1 and BROKEN not in row:
                row[BROKEN] = (
                    f"it has {len(pictures)} pictures, {', '.join(pictures[:3])}{', …' * (len(pictures) > 3)}: name one's "
                    "ending by data.image_column, or the files so that each row has a name of its own up to the first dot"
                )
            elif pictures:
                row[PICTURE] = row[pictures[0]]
            yield row

    def _pictures(self, row: dict[str, Any]) -> list[str]:
        """The named column, or else that of a picture: the first of those with a plain ending ("jpg"), or all others
        ("seg.png")."""
        files = [name for name, value in row.items() if isinstance(value, bytes)]
        if self.column in files or self.column != DataConfig.image_column:
            return [name for name in files if name == self.column]
        pictures = [name for name in files if is_picture(name)]
        return [name for name in pictures if "." not in name][:1] or pictures


class TableShards:
    """Shards of a data set that the Datasets library streams: parquet files, its own tar reader, and others.

    Each is read by itself, so its order does not depend on which process reads it. Where there are fewer shards than lanes,
    parquet files are divided by row groups.
    """

    def __init__(self, split: str, config: DataConfig):
        import datasets  # imported here because it takes seconds

        self.config, self.split = config, split
        files = files_expanded(config.data_files)
        try:
            data = datasets.load_dataset(config.name, data_files=files, split=split, streaming=True)
            if data.features is None:
                data = data._resolve_features()
        except Exception as error:
            raise ValueError(
                f"cannot stream the data set {config.name!r}, split {split!r}: {reason_of(error)}"
            ) from error
        columns = list(data.features)
        for option in ("image_column", "caption_column", "label_column", "key_column"):
            column = getattr(config, option)
            if column is not None and column not in columns:
                raise ValueError(
                    f"data.{option} is {column!r}, but {config.name!r} has the columns {', '.join(columns)}"
                )
        self.classes: list[str] | None = None
        if config.label_column is not None:
            self.classes = list(getattr(data.features[config.label_column], "names", None) or []) or None
        data = data.cast_column(config.image_column, datasets.Image(decode=False))
        self.data = data = by_row_groups(data) if data.num_shards < (config.lanes or USUAL_LANES) else data
        self.names = shard_names(data, f"{config.name} {split}")

    def rows(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        name, column = self.names[shard], self.config.image_column
        try:
            for row in self.data.shard(self.data.num_shards, shard).skip(start):
                yield with_picture(row, row.pop(column))
        except Exception as error:
            final = isinstance(error, FINAL) and not isinstance(error, UnreachableError)
            kind = ValueError if final else UnreachableError
            raise kind(f"the shard {name!r} cannot be read to its end: {reason_of(error)}") from error


def by_row_groups(data: Any) -> Any:
    """A streamed data set in more shards, where the library and the files can."""
    if not hasattr(data, "reshard"):
        return data
    try:
        return data.reshard()
    except FINAL:  # a file is damaged: whoever reads it says which
        return data
    except Exception as error:
        raise ValueError(f"the shards of a data set cannot be opened: {reason_of(error)}") from error


def with_picture(row: dict[str, Any], value: dict[str, Any] | None) -> dict[str, Any]:
    """A row with its picture's bytes, or with the reason why they are not there."""
    row[PICTURE] = None
    try:
        row[PICTURE] = None if value is None else picture_bytes(value)
    except UnreachableError:
        raise
    except ValueError as error:
        row[BROKEN] = str(error)
    return row


def picture_bytes(value: dict[str, Any]) -> bytes | None:
    """A picture's bytes, from the row itself or from the file that it names."""
    if value["bytes"] is None and value["path"] is not None:
        with opened(value["path"]) as file:
            return file.read()
    found: bytes | None = value["bytes"]
    return found


def shard_names(data: Any, otherwise: str) -> list[str]:
    """Names of the files that are a streamed data set's shards, where the library tells them, or else numbers."""
    arguments = getattr(getattr(data, "_ex_iterable", None), "kwargs", {})
    for files in arguments.values():
        if isinstance(files, list) and len(files) == data.num_shards and all(isinstance(file, str) for file in files):
            parts, seen = Counter(files), Counter[str]()
            names = []
            for file in files:
                seen[file] += 1
                names.append(file if parts[file] == 1 else f"{file} (part {seen[file]})")
            return names
    return [f"{otherwise}, shard {number} of {data.num_shards}" for number in range(data.num_shards)]

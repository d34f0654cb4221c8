"""The first rows of a stream with all their captions, and their pictures, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256

from torch import Tensor

from tarflow.data.config import DataConfig
from tarflow.data.folder import say_once
from tarflow.data.stream.first import square_stream
from tarflow.data.stream.rows import Row, RowReader
from tarflow.data.stream.shards import PICTURE


class CaptionedRows:
    """Rows of a stream's split in the order of its shards. They are read once, and again for their pictures; captions and
    columns alone are kept. Rows without a caption are left out where that is allowed.

    Args:
        config: the data section of a configuration.
        split: "train" or "validation".
        count: how many at most; None takes all.
        columns: whose values are kept too.

    Attributes:
        captions: of each row all that it may have, see `RowReader.captions`.
        values: of each row's ``columns``, as texts; empty ones are not there.
        fingerprint: a hash of the rows' pictures and their order.

    Raises:
        ValueError: that names shard and key of what cannot be read, or a column that no row has.
    """

    def __init__(self, config: DataConfig, split: str, count: int | None = None, columns: Sequence[str] = ()):
        self.config, self.split = config, split
        self.stream = square_stream(config, split, config.seed)
        self.captions: list[list[str]] = []
        self.values: list[list[tuple[str, str]]] = []
        self._places: list[tuple[int, int, int]] = []
        known, left_out, digest = set[str](), list[str](), sha256()
        for row in self.stream.one_pass(shuffled=False) if self.has_captions else ():
            if len(self.captions) == count:
                break
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                captions = self._reader(row).captions(row)
            except ValueError as error:
                if config.on_error == "raise":
                    raise
                left_out.append(str(error))
                continue
            known.update(row.values)
            found = [(name, row.values.get(name)) for name in columns]
            self.captions.append(captions)
            self.values.append([(name, str(value).casefold()) for name, value in found if value])
            self._places.append(place_of(row))
            digest.update(f"{row.place}\0".encode(errors="surrogateescape"))
            digest.update(row.values[PICTURE] or b"")
        if self.captions and (unknown := [name for name in columns if name not in known]):
            own = sorted(name for name in known if name != PICTURE)
            raise ValueError(f"the stream has no column {unknown[0]!r}; its rows have {', '.join(own)}")
        if left_out:
            say_once(f"{len(left_out)} rows cannot be read and are left out, for example: {left_out[0]}")
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def has_captions(self) -> bool:
        return self.stream.has_captions

    def pictures(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor | None]]:
        """Pictures of rows, uint8 (3, S, S), each with its place in ``indices``, as they come; None for one that cannot be
        read, where that is allowed.

        Raises:
            ValueError: that names shard and key of a picture which cannot be read.
        """
        wanted = {self._places[index]: number for number, index in enumerate(indices)}
        for row in self.stream.one_pass(shuffled=False) if wanted else ():
            number = wanted.pop(place_of(row), None) if isinstance(row, Row) else None
            if number is None or not isinstance(row, Row):
                continue
            reader = self._reader(row)
            try:
                picture = reader.pixels(row, reader.picture(row))
            except ValueError:
                if self.config.on_error == "raise":
                    raise
                yield number, None
            else:
                yield number, picture
            if not wanted:
                return
        for (source, shard, row_number), number in wanted.items():
            if self.config.on_error == "raise":
                name = self.stream.shards[source].names[shard]
                raise ValueError(
                    f"row {row_number} of the shard {name!r} was there a moment ago, and cannot be read any more"
                )
            yield number, None

    def _reader(self, row: Row) -> RowReader:
        reader = self.stream.readers[row.source]
        assert isinstance(reader, RowReader)  # a data section names streams alone
        return reader


def place_of(row: Row) -> tuple[int, int, int]:
    """The stream among several, the shard, and the row's number in that."""
    return row.source, row.shard, row.number

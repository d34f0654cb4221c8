"""What to train on: the data section of every configuration file."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Literal

from tarflow.common.checks import AtLeastOne, Fraction, Positive, check, check_ranges


@dataclass(frozen=True, kw_only=True)
class MixedSource:
    """One of several streams that are read together, see ``mix``; what is not given is as the data section has it.

    Attributes:
        weight: how often a picture is taken from it, relative to the other streams.
        source: "datasets" or "webdataset".
        path: of source "webdataset", its tar files.
        validation_path: of source "webdataset", the tar files of held-out pictures.
        name: of source "datasets".
        data_files: for a builder name.
        train_split: to train on.
        validation_split: of held-out pictures.
        image_column: of pictures.
        caption_column: of captions.
        label_column: of labels.
        key_column: whose hash decides whether a row is held out.
        caption_template: how a caption is made of the columns.
        where: only rows whose column has one of these values.
    """

    weight: Positive = 1.0
    source: Literal["datasets", "webdataset"] | None = None
    path: str | None = None
    validation_path: str | None = None
    name: str | None = None
    data_files: Any = None
    train_split: str | None = None
    validation_split: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    label_column: str | None = None
    key_column: str | None = None
    caption_template: str | None = None
    where: dict[str, list[Any]] | None = None


#: Settings that other sources than streams have not.
STREAM_SETTINGS = (
    *("validation_path", "mix", "lanes", "key_column", "aspect_ratios"),
    *("caption_weights", "choose_from_lists", "drop_caption_parts"),
)


#: Sources that other settings are for. Those of captions and rows may stay beside "latents", which were cached with them.
CAPTIONED = ("folder", "datasets", "webdataset", "latents")
SOURCES_OF = {
    "path": ("folder", "webdataset", "latents"),
    "name": ("datasets", "latents"),
    "data_files": ("datasets", "latents"),
    "train_split": ("datasets", "latents"),
    "validation_split": ("drawings", "datasets", "latents"),
    "validation_path": ("webdataset",),
    "split_folders": ("folder", "latents"),
    "image_column": ("datasets", "webdataset", "latents"),
    "label_column": ("datasets", "webdataset", "latents"),
    **dict.fromkeys(
        ("where", "class_names", "caption_column", "caption_template", "more_caption_templates"), CAPTIONED
    ),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pictures, captions and labels come from.

    Attributes:
        source: "drawings" (made by the project), "folder" (a local folder or zip archive), "datasets" (a name that the
            Datasets library loads), "webdataset" (tar files by path or URL, read as a stream), or "latents" (a folder
            that ``tarflow cache-latents`` wrote).
        path: the folder or zip archive of source "folder". Class folders give labels; ``metadata.jsonl`` files, with
            a ``file_name`` that counts from their own folder, give captions instead. A single folder that holds
            folders alone only wraps them. If then all top folders are named ``train`` or ``training``, ``val``,
            ``valid``, ``validation``, ``dev``, ``test``, ``testing``, ``eval`` or ``evaluation``, in small letters or
            capitals, they are splits: the first two for training, the others held out. Links are followed; what
            systems leave there (names that begin with a dot, ``__MACOSX``, ``@eaDir``) is none of the data. Of source
            "latents", the cache, in a folder or at a URL that fsspec knows (``s3://``, ``gs://``, ``hf://`` …), or
            several as a list: splits, columns, captions, names, background and ``seed`` were settled when it was made
            and have no effect here. Of source "webdataset", a path or URL of tar files, with braces or stars:
            "s3://bucket/train-{00000..00099}.tar".
        weights: of source "latents" with a list of caches, the share of each in what is trained on, (0.7, 0.3), whatever
            their sizes are; None takes each picture as often as any other.
        shuffle_shards: of source "latents", how many shards are mixed at a time, of each shape and each weighted cache:
            a pass takes the shards in a shuffled order, so many at a time, and shuffles the pictures of these. 0 mixes
            all pictures; None is 0 for caches on this machine and 16 for those at a URL.
        cache_gb: of source "latents" at a URL, how many GB (10⁹ bytes) local copies of shards may take, those of other
            caches included; those that were needed longest ago are removed. They lie in ``shards`` of the user's cache:
            the folder ``TARFLOW_CACHE``, or else ``tarflow`` in ``XDG_CACHE_HOME`` or the system's place for caches.
        validation_path: of source "webdataset", the tar files of held-out pictures; None holds out
            ``validation_fraction`` of the rows.
        streaming: read source "datasets" as a stream: nothing is listed, downloaded or stored.
        mix: several streams by name, which are read together by their weights.
        lanes: of a stream, how many readings of it are dealt out to the processes; None takes 8, or more if the processes
            need them. Runs whose processes share the lanes evenly see the same pictures at each step.
        shuffle_buffer: of a stream, how many rows of all lanes are shuffled among each other.
        key_column: of a stream, the column whose hash decides whether a row is held out; None takes the key of a row in a
            tar file, or else its place (shard and number).
        aspect_ratios: of a stream, width:height of the sizes that pictures are brought to, each to the nearest, such as
            ["1:1", "4:3", "3:4"], at about the area of the square; None makes squares.
        caption_weights: of a stream, how often each way to say it is taken, ``caption_template`` or the column first, then
            ``more_caption_templates``; None takes all equally often. A row has one caption, another one in each pass.
        choose_from_lists: of a stream, take one of a column's texts where it holds a list, instead of joining them.
        drop_caption_parts: of a stream, the share of a caption's parts, between commas, that are left out; the first part
            never is, nor is any of a held-out picture.
        split_folders: what to do where some top folders have names of splits and others have not: "auto" refuses
            them, "only" takes the splits and leaves the others out, "none" takes all for classes, also where all have names
            of splits.
        name: the name of source "datasets": a hub id, a local data set, or a builder such as "parquet".
        data_files: files for a builder name.
        image_size: side of the square pictures in pixels; larger ones are resized and centre-cropped.
        train_split: the split of source "datasets" that is trained on.
        validation_split: the split that is held out; None holds out ``validation_fraction`` of the other.
        validation_fraction: the share that is held out, by a hash of caption or file name, of data without a split for
            it, such as folders without split folders.
        image_column: the column of pictures; of source "webdataset", the ending of their files, if not the only picture
            of a row.
        caption_column: the column of captions, in ``metadata.jsonl`` or of the data set; None where there is none.
        label_column: of source "datasets" or a stream, the column of labels: class numbers from 0 on, or texts, whose
            sorted values are the classes.
        caption_template: how a caption is made of the columns, "{text}, {style} style"; None takes caption_column. The
            words of a column that holds a list are joined by commas.
        more_caption_templates: other ways to say it: each training picture is there once more with each of them,
            unless a column in it is empty. Held-out pictures have the first way alone.
        where: only rows whose column has one of these values, {"style": ["noto", "twemoji"]}; None takes all.
        class_names: readable names by class folder or text, or by position as a list; None takes their own names.
        background: what transparent pictures are put on: "white", "black", or "random" (another one per picture).
        verify: of source "latents", read all files when training starts, not when it is resumed, and compare their
            checksums; of caches at a URL, compare them whenever a file has arrived.
        flip: mirror half of the training pictures.
        on_error: "raise" at an unreadable picture, or "skip": take the next one, count and report it. Pictures of
            formats that cannot be read here are refused at the start, or by "skip" left out, counted and reported. Of
            source "latents" at a URL, what to do when a shard cannot be fetched, also not after three more tries with
            waiting: stop, or take the pictures of the next shard for its own and report it.
        seed: which drawings are made, and the colours of random backgrounds.
    """

    source: Literal["drawings", "folder", "datasets", "webdataset", "latents"] = "drawings"
    path: list[str] | str | None = None
    weights: list[float] | None = None
    shuffle_shards: int | None = None
    cache_gb: float = 20.0
    validation_path: str | None = None
    streaming: bool = False
    mix: dict[str, MixedSource] | None = None
    lanes: AtLeastOne | None = None
    shuffle_buffer: AtLeastOne = 2048
    key_column: str | None = None
    aspect_ratios: list[str] | None = None
    caption_weights: list[Positive] | None = None
    choose_from_lists: bool = False
    drop_caption_parts: Fraction = 0.0
    split_folders: Literal["auto", "only", "none"] = "auto"
    name: str | None = None
    data_files: Any = None
    image_size: int = 64
    train_split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.02
    image_column: str = "image"
    caption_column: str | None = None
    label_column: str | None = None
    caption_template: str | None = None
    more_caption_templates: list[str] = field(default_factory=list)
    where: dict[str, list[Any]] | None = None
    class_names: dict[str, str | int] | list[str | int] | None = None
    background: Literal["white", "black", "random"] = "white"
    verify: bool = True
    flip: bool = False
    on_error: Literal["raise", "skip"] = "raise"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.class_names is not None:  # YAML takes names such as 1 for numbers
            object.__setattr__(self, "class_names", as_texts(self.class_names))
        if self.source == "folder" and not self.path:
            raise ValueError("data.source is 'folder', so data.path must name a folder or a zip archive")
        if self.source == "latents" and not self.path:
            raise ValueError("data.source is 'latents', so data.path must name a folder made by tarflow cache-latents")
        self._check_other_sources()
        if isinstance(self.path, list) and self.source != "latents":
            more = "; braces or stars in it name several files, data.mix several sets" * (self.source == "webdataset")
            raise ValueError(
                f"data.path is a list, but data.source {self.source!r} takes one; only 'latents' takes several{more}"
            )
        self._check_caches()
        if self.source == "datasets" and not self.name and not self.mix:
            raise ValueError("data.source is 'datasets', so data.name must name a data set")
        if self.more_caption_templates and not (self.caption_template or self.caption_column):
            raise ValueError("data.more_caption_templates is set, but neither caption_template nor caption_column is")
        if self.image_size < 1:
            raise ValueError(f"data.image_size must be at least 1, got {self.image_size}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction must be in [0, 1), got {self.validation_fraction}")
        check_ranges(self, "data")
        self._check_stream()
        self._check_own_settings()

    def check_count(self, count: int | None, option: str) -> None:
        """An error if all pictures are asked for where there is no end of them.

        Args:
            count: how many are; None is all.
            option: what that number is called.
        """
        if self.source == "drawings" and count is None:
            raise ValueError(f"the drawings have no end: say how many to take with {option}")

    @property
    def is_stream(self) -> bool:
        """Whether rows are read as they come."""
        return self.streaming or self.source == "webdataset"

    @property
    def parts(self) -> dict[str, tuple[float, DataConfig]]:
        """The streams that are read together, by name, with their weights."""
        if not self.mix:
            return {str(self.path or self.data_files or self.name): (1.0, self)}
        found = {}
        for name, part in self.mix.items():
            given = {field.name: getattr(part, field.name) for field in fields(part) if field.name != "weight"}
            given = {key: value for key, value in given.items() if value is not None} | {"streaming": True}
            source = given.get("source", self.source)
            for own in fields(DataConfig):  # what is for the other parts
                if own.name not in given and source not in SOURCES_OF.get(own.name, (source,)):
                    given[own.name] = default_of(own)
            found[name] = part.weight, replace(self, mix=None, **given)
        return found

    def _check_other_sources(self) -> None:
        """Settings of another source, without which other pictures would be meant."""
        if self.source == "drawings" and self.path is not None:
            raise ValueError(
                f"data.path is {self.path!r}, but data.source is 'drawings', which the project makes itself: give --data.source "
                "folder for pictures, or --data.path null"
            )
        if self.source == "folder" and self.label_column is not None:
            raise ValueError(
                f"data.label_column is {self.label_column!r}, but the classes of a folder are the folders in it: give "
                "--data.label_column null"
            )
        if self.source == "folder" and self.validation_split is not None:
            raise ValueError(
                f"data.validation_split is {self.validation_split!r}, but a folder's splits are its folders train and "
                "validation, or else data.validation_fraction is held out: give --data.validation_split null"
            )
        if self.source == "webdataset" and self.validation_split is not None and not self.mix:
            raise ValueError(
                f"data.validation_split is {self.validation_split!r}, but tar files have no named splits: give "
                "--data.validation_path, or --data.validation_split null"
            )
        if self.source == "datasets" and self.validation_path is not None and not self.mix:
            raise ValueError(
                f"data.validation_path is {self.validation_path!r}, but a data set's splits have names: give "
                "--data.validation_split, or --data.validation_path null"
            )

    def _check_own_settings(self) -> None:
        """Settings that have no effect with this source, of which nothing more is known than that."""
        for own in () if self.mix else fields(DataConfig):
            usual = default_of(own)
            value, sources = getattr(self, own.name), SOURCES_OF.get(own.name)
            if sources is not None and value != usual and self.source not in sources:
                raise ValueError(
                    f"data.{own.name} is {value!r}, but it is for data.source {' or '.join(map(repr, sources))}, and has no effect "
                    f"with {self.source!r}: leave it out, or give --data.{own.name} {in_yaml(usual)}"
                )

    def _check_stream(self) -> None:
        check(
            self.source != "webdataset" or bool(self.path or self.mix),
            "data.source is 'webdataset', so data.path must name tar files, such as 'shards/{0000..0099}.tar'",
        )
        check(
            not self.streaming or self.source in ("datasets", "webdataset"),
            f"data.streaming is for data.source 'datasets', got {self.source!r}; tar files are data.source 'webdataset'",
        )
        if not self.is_stream:
            for own in fields(DataConfig):
                if own.name in STREAM_SETTINGS and getattr(self, own.name) != own.default:
                    raise ValueError(
                        f"data.{own.name} is for streams: data.source 'webdataset', or 'datasets' with data.streaming true"
                    )
            return
        ways = 1 + len(self.more_caption_templates)
        weights = self.caption_weights
        check(
            weights is None or len(weights) == ways,
            f"data.caption_weights has {len(weights or ())} numbers, but there are {ways} ways to say a caption",
        )
        if self.mix:
            for _, part in self.parts.values():
                part._check_stream()

    def _check_caches(self) -> None:
        if self.weights is not None:
            count = len(self.path) if isinstance(self.path, list) else 1
            if self.source != "latents" or len(self.weights) != count:
                raise ValueError(f"data.weights has {len(self.weights)} numbers: give one for each cache in data.path")
            if not all(0 < weight < math.inf for weight in self.weights):
                raise ValueError(f"data.weights must be positive, got {self.weights}")
        if self.shuffle_shards is not None and self.shuffle_shards < 0:
            raise ValueError(f"data.shuffle_shards must be 0 (all) or positive, got {self.shuffle_shards}")
        if not 0 < self.cache_gb < math.inf:
            raise ValueError(f"data.cache_gb must be positive, got {self.cache_gb}")


def default_of(field: Field[Any]) -> Any:
    """The default of a dataclass's field."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def in_yaml(value: Any) -> str:
    """A default as one types it."""
    return "null" if value is None else "'[]'" if value == [] else str(value)


def as_texts(names: dict[Any, Any] | list[Any]) -> dict[str, str] | list[str]:
    """Names of classes, of which some may have been read as numbers.

    Raises:
        ValueError: for what is neither text nor number.
    """
    values = names.values() if isinstance(names, dict) else names
    for name in values:
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ValueError(f"data.class_names has {name!r}, expected texts; put names such as no or 1e3 in quotes")
    return {str(key): str(name) for key, name in names.items()} if isinstance(names, dict) else [str(n) for n in names]

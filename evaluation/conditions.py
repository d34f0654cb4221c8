"""What each generated image is drawn from: a caption, a class label, or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tarflow.common.files import json_lines
from tarflow.data.config import DataConfig
from tarflow.data.drawings import all_captions, random_drawing
from tarflow.data.folder import ImageFolder, say_once
from tarflow.data.images import Images
from tarflow.data.named import NamedDataset
from tarflow.data.stream.first import FirstCaptions
from tarflow.data.stream.stream import Stream
from tarflow.data.subset import check_not_empty
from tarflow.pipeline.call.checks import check_kind
from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.conditions import check_class_names
from tarflow.pipeline.loading.examples import example_captions

#: Labels of so many drawings are counted, as there is no end of them.
COUNTED_DRAWINGS = 10_000


@dataclass(frozen=True)
class Conditions:
    """The condition of image i, which depends on i (and for drawn labels on the seed) alone.

    Attributes:
        kind: "caption", "label" or "none".
        values: the captions, or labels from 0 on, of some indices.
        summary: what they depend on, as JSON has it.
        fixed: whether the summary tells them all. Captions of data, which are not read through, may change without it.
    """

    kind: str
    values: Callable[[Sequence[int]], list[Any]]
    summary: dict[str, Any]
    fixed: bool = True

    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of a pipeline's call for these images."""
        if self.kind == "none":
            return {"num_images": len(indices)}
        return {"prompt" if self.kind == "caption" else "class_labels": self.values(indices)}


def make_conditions(
    pipe: FlowPipeline,
    seed: int = 0,
    labels: int | str | None = None,
    label_counts: list[float] | None = None,
    captions: str | None = None,
    data: DataConfig | None = None,
    split: str = "train",
) -> Conditions:
    """Conditions that fit a pipeline; the arguments are explained at `GenerationConfig`.

    Raises:
        ValueError: for conditions that the model does not take, lacks or cannot find.
    """
    kind = pipe.flow.config.conditioning
    check_kind(kind, {"captions": captions}, {"labels": labels, "label_counts": label_counts})
    if kind == "prefix":
        if captions is None:
            captions, examples = default_captions(pipe, data)
            return caption_conditions(captions, data, split, examples)
        return caption_conditions(captions, data, split)
    if kind == "none":
        return Conditions("none", lambda indices: [], {"kind": "none"})
    return label_conditions(pipe, seed, labels, label_counts, data, split)


def default_captions(pipe: FlowPipeline, data: DataConfig | None) -> tuple[str, list[str]]:
    """Where captions come from if nobody says so: the data, if some is given, or else the pipeline's own examples.

    Returns:
        what `GenerationConfig` calls the captions, or "examples"; and these.

    Raises:
        ValueError: that names the options, if there is neither.
    """
    if data is not None:
        return "data", []
    if examples := example_captions(pipe):
        return "examples", examples
    raise ValueError(
        "this model draws from captions, and its folder has no examples.json: give --captions FILE, with one per line, or "
        "--captions data with --data.source folder --data.path PATH, or of a model of drawings --captions drawings"
    )


def caption_conditions(captions: str, data: DataConfig | None, split: str, examples: Sequence[str] = ()) -> Conditions:
    """Image i has caption i, and after the last one the first again; ``examples`` take the place of captions."""
    if captions == "data":
        if data is None:
            raise ValueError("captions are to be the data's, but no data is given")
        if data.is_stream:
            return stream_captions(data, split)
        images = Images(data, split)
        if not len(images) or not images.has_captions:
            raise ValueError(f"the data's split {split!r} has no {'captions' if len(images) else 'pictures'}")
        texts: Any = images.caption
        count, digest = len(images), repr((data, split))
    else:
        lines = list(examples) or (all_captions() if captions == "drawings" else read_captions(captions))
        texts, count, digest = lines.__getitem__, len(lines), "\n".join(lines)
    summary = {"kind": "caption", "count": count, "sha256": hashlib.sha256(digest.encode()).hexdigest()}
    fixed = captions != "data" or (data is not None and data.source == "drawings")
    return Conditions("caption", lambda indices: [texts(index % count) for index in indices], summary, fixed)


def stream_captions(data: DataConfig, split: str) -> Conditions:
    """Image i has caption i of a stream's shards, which are read as far as it takes."""
    found = FirstCaptions(data, split)
    digest = hashlib.sha256(repr((data, split, found.stream.identity)).encode()).hexdigest()
    summary = {"kind": "caption", "count": None, "sha256": digest}
    return Conditions("caption", lambda indices: [found[index] for index in indices], summary, fixed=False)


def read_captions(path: str) -> list[str]:
    """Captions of a text file, one per line, or of a ``.jsonl`` with "text" or "caption" in each line.

    Raises:
        ValueError: if the file is missing, has no captions, or a line cannot be read.
    """
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the captions file {path!r}: {error}") from error
    found = []
    if file.suffix.lower() == ".jsonl":
        for number, row in json_lines(content, repr(path)):
            caption = row.get("text", row.get("caption")) if isinstance(row, dict) else None
            if caption is None:
                raise ValueError(f"line {number} of {path!r} is no JSON object with a text")
            if not isinstance(caption, str):
                raise ValueError(f"line {number} of {path!r} has the text {caption!r}, expected a string")
            found.append(caption)
    else:
        try:
            # Lines end at line feeds alone, as in files of JSON; Windows adds a mark at the start and carriage returns.
            lines = content.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the captions file {path!r} is no UTF-8 text: {error.reason}; save it as UTF-8"
            ) from error
        found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"the captions file {path!r} is empty; give one caption per line")
    return found


def label_conditions(
    pipe: FlowPipeline,
    seed: int,
    labels: int | str | None,
    label_counts: list[float] | None,
    data: DataConfig | None,
    split: str,
) -> Conditions:
    """All classes in turn, labels drawn by frequency, or always the same label."""
    classes = pipe.flow.config.num_classes
    if label_counts is not None and labels != "data":
        raise ValueError(f"label_counts have an effect only with labels 'data', but labels are {labels!r}")
    if labels is None or labels == "balanced":
        summary = {"kind": "label", "labels": "balanced", "classes": classes}
        return Conditions("label", lambda indices: [index % classes for index in indices], summary)
    if labels != "data":
        (label,) = pipe.label_indices(labels)
        return Conditions("label", lambda indices: [label] * len(indices), {"kind": "label", "labels": label})
    if label_counts is None:
        if data is None:
            raise ValueError("labels are to be drawn as in the data: give label_counts or data")
        label_counts = data_label_counts(data, split, classes, partial(check_class_names, pipe))
    counts = np.asarray(label_counts, dtype=np.float64)
    if len(counts) != classes or not (counts >= 0).all() or not 0 < counts.sum() < np.inf:
        raise ValueError(f"label_counts must be {classes} numbers, none below 0 and not all 0, got {label_counts}")
    limits = counts.cumsum() / counts.sum()

    def draw(indices: Sequence[int]) -> list[int]:
        uniform = [np.random.default_rng((seed, index)).random() for index in indices]
        return np.searchsorted(limits, uniform, side="right").tolist()

    return Conditions("label", draw, {"kind": "label", "labels": "data", "counts": counts.tolist()})


def data_label_counts(
    data: DataConfig, split: str, classes: int, check_names: Callable[[Sequence[str]], None] | None = None
) -> list[float]:
    """How many pictures of a split have each label, without opening them; of drawings, of the first ones, and of several
    streams their parts by weight.

    Raises:
        ValueError: if the data has no labels, or others than the model, or what ``check_names`` raises of their names.
    """
    if data.is_stream:
        return stream_label_counts(data, split, classes, check_names)
    images = Images(data, split)
    source = images.source
    if images.class_names is None or not len(images):
        raise ValueError(f"the data's split {split!r} has no class labels to draw from")
    if check_names is not None:
        check_names(images.class_names)
    if isinstance(source, ImageFolder):
        labels = [row.label for row in source.rows if row.label is not None]
    elif isinstance(source, NamedDataset) and source.labels is not None:
        labels = [source.labels.number(value) for value in source.data[data.label_column]]
    else:
        labels = [random_drawing(data.seed, index, split).label for index in range(COUNTED_DRAWINGS)]
    check_labels(min(labels), max(labels), classes)
    return np.bincount(labels, minlength=classes).astype(float).tolist()


def stream_label_counts(
    data: DataConfig, split: str, classes: int, check_names: Callable[[Sequence[str]], None] | None = None
) -> list[float]:
    """The same of a stream, which is read through; rows that cannot be read are left out where that is allowed.

    Raises:
        ValueError: see `data_label_counts`.
    """
    stream = Stream(data, split, data.seed)
    if stream.class_names is None:
        raise ValueError(f"the data's split {split!r} has no class labels to draw from")
    if check_names is not None:
        check_names(stream.class_names)
    check_labels(0, len(stream.class_names) - 1, classes)
    say_once("the stream is read through once, to count its labels; label_counts would spare that")
    counts = np.zeros((len(stream.readers), classes))
    for row in stream.one_pass(shuffled=False):
        if isinstance(row, str):
            continue
        try:
            counts[row.source, stream.readers[row.source].label(row)] += 1
        except ValueError:
            if data.on_error == "raise":
                raise
    check_not_empty(int(counts.sum()), split)
    if len(counts) > 1:
        totals, weights = counts.sum(1), np.array(stream.weights)
        shares = weights * (totals > 0) / weights[totals > 0].sum()
        counts *= (shares / np.maximum(totals, 1))[:, None]
    return counts.sum(0).tolist()


def check_labels(first: int, last: int, classes: int) -> None:
    """Refuse data of other labels than a model's."""
    if not 0 <= first <= last < classes:
        raise ValueError(f"the data has labels {first} to {last}, but the model 0 to {classes - 1}")

"""Columns of data sets: labels as numbers, texts and floats, gaps in them, and pictures as bytes or paths."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tarflow.data.config import DataConfig
from tarflow.data.images import Images
from tarflow.evaluation.conditions import data_label_counts

COLUMNS: dict[str, tuple[str, list[Any]]] = {
    "text": ("string", ["dog", "cat", "dog", "Cat"]),
    "float": ("float64", [0.0, 2.0, 1.0, 0.0]),
    "truth": ("bool", [True, False, True, True]),
    "gap": ("int64", [0, None, 1, None]),
    "textgap": ("string", ["a", "b", None, "a"]),
    "half": ("float64", [0.0, 0.5, 1.0, 1.0]),
    "nan": ("float64", [0.0, float("nan"), 1.0, 1.0]),
    "empty": ("int64", [None] * 4),
    "large": ("int64", [0, 1, 2, 10**12]),
    "none": ("int64", [-1] * 4),
    "kept": ("string", ["yes", "no", "yes", "no"]),
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataConfig]:
    """Writes a parquet file of four pictures with the columns above; gives the settings of its data."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pictures = []
    for i in range(4):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(file, "PNG")
        pictures.append(file.getvalue())
        (tmp_path / f"{i}.png").write_bytes(pictures[-1])
    rows: dict[str, list[Any]] = {name: values for name, (_, values) in COLUMNS.items()}
    kinds = {name: datasets.Value(kind) for name, (kind, _) in COLUMNS.items()}
    rows |= {"image": [{"bytes": data, "path": None} for data in pictures], "raw": pictures}
    rows |= {"path": [str(tmp_path / f"{i}.png") for i in range(4)], "several": [["a"]] * 4}
    kinds |= {"image": datasets.Image(), "raw": datasets.Value("binary"), "path": datasets.Value("string")}
    kinds |= {"several": datasets.List(datasets.Value("string"))}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(tmp_path / "four.parquet")

    def make(**options: Any) -> DataConfig:
        files = str(tmp_path / "four.parquet")
        defaults = {"data_files": files, "image_size": 4, "validation_fraction": 0.0}
        return DataConfig(source="datasets", name="parquet", **{**defaults, **options})

    return make


@pytest.mark.parametrize(
    ("column", "classes", "labels"),
    [
        ("text", ("Cat", "cat", "dog"), [2, 1, 2, 0]),
        ("float", ("0", "1", "2"), [0, 2, 1, 0]),
        ("truth", ("0", "1"), [1, 0, 1, 1]),
    ],
)
def test_labels(table: Callable[..., DataConfig], column: str, classes: tuple[str, ...], labels: list[int]) -> None:
    images = Images(table(label_column=column))
    assert images.class_names == classes
    assert [images[i]["label"] for i in range(4)] == labels


def test_labels_are_counted(table: Callable[..., DataConfig]) -> None:
    assert data_label_counts(table(label_column="text"), "train", 3) == [1, 1, 2]
    assert data_label_counts(table(label_column="float"), "train", 4) == [2, 1, 1, 0]


def test_readable_names_of_texts(table: Callable[..., DataConfig]) -> None:
    names = {"cat": "a cat", "Cat": "the cat", "dog": "a dog"}
    assert Images(table(label_column="text", class_names=names)).class_names == ("the cat", "a cat", "a dog")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("gap", r"'gap' of 'parquet' is empty in 2 of 4 rows of the split 'train', first 1: leave these rows out"),
        ("textgap", "'textgap' of 'parquet' is empty in 1 of 4 rows of the split 'train', first 2"),
        ("half", "'half' of 'parquet' has the value 0.5, expected whole numbers from 0 on, or texts"),
        ("nan", "'nan' of 'parquet' has the value nan, expected whole numbers"),
        ("empty", "'empty' of 'parquet' has no values"),
        ("large", "'large' of 'parquet' has the value 1000000000000, too large for a class number"),
        ("none", "'none' of 'parquet' has no class number, its largest value is -1: count classes from 0 on"),
        ("several", r"'several' of 'parquet' holds no class numbers or texts: its type is List"),
        ("raw", "'raw' of 'parquet' holds no class numbers or texts"),
    ],
)
def test_labels_that_are_none(table: Callable[..., DataConfig], column: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"data.label_column {message}"):
        Images(table(label_column=column))


def test_rows_without_a_label_can_be_left_out(table: Callable[..., DataConfig]) -> None:
    images = Images(table(label_column="gap", where={"gap": [0, 1]}))
    assert [images[i]["label"] for i in range(len(images))] == [0, 1]


def test_rows_are_counted_in_the_whole_split(table: Callable[..., DataConfig]) -> None:
    with pytest.raises(ValueError, match="is empty in 1 of 2 rows of the split 'train', first 2: leave"):
        Images(table(label_column="textgap", where={"kept": ["yes"]}))


def test_both_splits_have_the_same_classes(table: Callable[..., DataConfig]) -> None:
    """Also where the held-out rows lack some of them; others than in training are refused."""
    own = table(label_column="text", train_split="train[:3]", validation_split="train[:1]")
    held_out = Images(own, "validation")
    assert (held_out.class_names, held_out[0]["label"]) == (("cat", "dog"), 1)
    numbers = table(label_column="float", train_split="train", validation_split="train[2:3]")
    assert Images(numbers, "validation").class_names == ("0", "1", "2")
    other = table(label_column="text", train_split="train[:3]", validation_split="train[3:]")
    with pytest.raises(ValueError, match=r"has in the split 'train\[3:\]' the class 'Cat', which training lacks"):
        Images(other, "validation")


@pytest.mark.parametrize("column", ["raw", "path"])
def test_pictures_as_bytes_or_paths(table: Callable[..., DataConfig], column: str) -> None:
    images = Images(table(image_column=column))
    assert [int(images[i]["image"][0, 0, 0]) for i in range(4)] == [0, 40, 80, 120]
    assert images.source.size(3) == (4, 4)


@pytest.mark.parametrize("column", ["float", "several"])
def test_columns_without_pictures_are_named(table: Callable[..., DataConfig], column: str) -> None:
    with pytest.raises(ValueError, match=f"image_column is '{column}', but that column of 'parquet' holds no pictures"):
        Images(table(image_column=column))


def test_gaps_in_captions_are_named(table: Callable[..., DataConfig]) -> None:
    images = Images(table(caption_template="{text}: {textgap}"))
    assert images[0]["caption"] == "dog: a"
    with pytest.raises(ValueError, match=r"the row of 'parquet\[2\]' has no value in the column 'textgap'"):
        images[2]

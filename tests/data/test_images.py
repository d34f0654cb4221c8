"""Pictures from folders, archives and Datasets."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow.common.modes import flatten
from tarflow.data.config import DataConfig
from tarflow.data.files import Files
from tarflow.data.folder import ImageFolder, is_held_out, read_size
from tarflow.data.images import Images, background_colour, collate, fit, open_source
from tarflow.evaluation.images.sets import open_images

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def write_image(path: Path, colour: tuple[int, ...] = RED, size: tuple[int, int] = (10, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)


def folder_config(path: Path | str, **options: Any) -> DataConfig:
    return DataConfig(source="folder", path=str(path), **{"image_size": 8, "validation_fraction": 0.0, **options})


def write_metadata(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Class folders "a" (red) and "b" (green) of two pictures each."""
    for name, colour in (("b", GREEN), ("a", RED)):
        for i in range(2):
            write_image(tmp_path / "data" / name / f"{i}.png", colour)
    return tmp_path / "data"


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Three pictures with captions and styles, one in a subfolder."""
    folder = tmp_path / "data"
    rows = []
    for name, colour, style in (("x.png", RED, "flat"), ("deep/y.webp", GREEN, "round"), ("z.jpg", BLUE, "flat")):
        write_image(folder / name, colour)
        rows.append({"file_name": name, "text": f"picture {name[-5]}", "style": style, "size": 3})
    write_metadata(folder, rows)
    return folder


def to_zip(folder: Path) -> Path:
    path = folder.parent / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("empty")
        for file in folder.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_class_folders(classes: Path, zipped: bool) -> None:
    images = Images(folder_config(to_zip(classes) if zipped else classes))
    assert (len(images), images.class_names) == (4, ("a", "b"))
    items = [images[i] for i in range(4)]
    assert [item["label"] for item in items] == [0, 0, 1, 1]
    assert items[0]["image"].shape == (3, 8, 8)
    assert items[0]["image"].dtype == torch.uint8
    assert items[0]["image"].is_contiguous()
    assert items[0]["image"][:, 4, 4].tolist() == list(RED)
    assert items[3]["image"][:, 4, 4].tolist() == list(GREEN)
    assert all(item["skipped"] == [] and "caption" not in item for item in items)
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again[2]["image"], items[2]["image"])


def test_class_names(classes: Path) -> None:
    assert Images(folder_config(classes, class_names={"a": "apple", "b": "bee", "c": "sea"})).class_names == (
        "apple",
        "bee",
    )
    assert Images(folder_config(classes, class_names=["one", "two"])).class_names == ("one", "two")
    with pytest.raises(ValueError, match=r"lacks the classes b.* Give --data\.class_names null"):
        Images(folder_config(classes, class_names={"a": "apple"}))
    with pytest.raises(ValueError, match="1 names, but the data has 2 classes"):
        Images(folder_config(classes, class_names=["one"]))


@pytest.mark.parametrize("validation", ["val", "validation", "test"])
def test_split_folders(tmp_path: Path, validation: str) -> None:
    for name in ("train/a/0.png", "train/b/1.png", f"{validation}/a/2.png"):
        write_image(tmp_path / name)
    train = Images(folder_config(tmp_path, validation_fraction=0.5))
    held_out = Images(folder_config(tmp_path, validation_fraction=0.5), "validation")
    assert ([row.name for row in train.source.rows], train.class_names) == (
        ["train/a/0.png", "train/b/1.png"],
        ("a", "b"),
    )
    assert [(row.name, row.label) for row in held_out.source.rows] == [(f"{validation}/a/2.png", 0)]


def test_a_fraction_is_held_out(tmp_path: Path) -> None:
    for i in range(40):
        write_image(tmp_path / f"{i:02}.png", size=(2, 2))
    config = folder_config(tmp_path, validation_fraction=0.25)
    train, held_out = ({row.name for row in ImageFolder(config, split).rows} for split in ("train", "validation"))
    assert not train & held_out
    assert len(train | held_out) == 40
    assert 2 <= len(held_out) <= 20
    assert held_out == {name for name in train | held_out if is_held_out(name, 0.25)}
    assert len(ImageFolder(folder_config(tmp_path), "validation")) == 0


@pytest.mark.parametrize("zipped", [False, True])
def test_captions(captioned: Path, zipped: bool) -> None:
    images = Images(folder_config(to_zip(captioned) if zipped else captioned))
    assert [images[i]["caption"] for i in range(3)] == ["picture x", "picture .", "picture z"]
    assert [images.caption(i) for i in range(3)] == [images[i]["caption"] for i in range(3)]
    assert images.has_captions
    assert [images.source.size(i) for i in range(3)] == [(8, 10)] * 3
    assert images.class_names is None
    assert "label" not in images[0]
    assert images[1]["image"][:, 4, 4].tolist() == pytest.approx(list(GREEN), abs=2)


def test_one_caption_is_in_one_split(tmp_path: Path) -> None:
    rows = []
    for i in range(20):
        write_image(tmp_path / f"{i}.png", size=(2, 2))
        rows.append({"file_name": f"{i}.png", "text": f"caption {i // 4}"})
    write_metadata(tmp_path, rows)
    config = folder_config(tmp_path, validation_fraction=0.5)
    splits = [{row.caption for row in ImageFolder(config, split).rows} for split in ("train", "validation")]
    assert not splits[0] & splits[1]
    assert len(splits[0] | splits[1]) == 5


def test_where_and_template(captioned: Path) -> None:
    images = Images(
        folder_config(captioned, where={"style": ["flat"], "size": [3]}, caption_template="{text}, {style}")
    )
    assert [images[i]["caption"] for i in range(len(images))] == ["picture x, flat", "picture z, flat"]
    assert Images(folder_config(captioned, caption_column="style"))[1]["caption"] == "round"


def test_more_ways_to_say_it(tmp_path: Path) -> None:
    rows = []
    for i in range(8):
        write_image(tmp_path / f"{i}.png", size=(2, 2))
        rows.append({"file_name": f"{i}.png", "text": f"thing {i}", "tags": ["a", "b"] if i % 2 else []})
    write_metadata(tmp_path, rows)
    templates = ["a {text}", "{tags}, {text}", "{text}"]
    config = folder_config(tmp_path, caption_column="text", more_caption_templates=templates, validation_fraction=0.4)
    captions = {split: [row.caption for row in ImageFolder(config, split).rows] for split in ("train", "validation")}
    held_out = captions["validation"]
    assert 0 < len(held_out) < 8
    assert all(caption.startswith("thing") for caption in held_out)
    expected = []
    for i in sorted(set(range(8)) - {int(caption[-1]) for caption in held_out}):
        tags = [f"a, b, thing {i}"] if i % 2 else []
        expected += [f"thing {i}", f"a thing {i}", *tags, f"thing {i}"]
    assert captions["train"] == expected
    with pytest.raises(ValueError, match="neither caption_template nor caption_column"):
        folder_config(tmp_path, more_caption_templates=templates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"where": {"colour": ["red"]}},
            "names the column 'colour', but .* has file_name, size, style, text: give --data.where null for all pictures$",
        ),
        (
            {"where": {"kind": ["a"]}, "caption_template": "{text}, {kind}"},
            r"give --data\.where null .* and --data\.caption_template null, as '\{text\}, \{kind\}' names it too",
        ),
        ({"where": {"style": ["square"]}}, "no images are left .* where={'style': \\['square'\\]}"),
        ({"caption_template": "{title}"}, "has no column 'title' for its caption; it has file_name, size, style, text"),
        ({"caption_column": "title"}, "has no column 'title'"),
        ({"caption_column": "size"}, "the caption of 'x.png' is 3, expected a text"),
    ],
)
def test_columns_that_are_not_there(captioned: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Images(folder_config(captioned, **options))


def test_missing_captions_are_counted(captioned: Path) -> None:
    write_image(captioned / "new.png")
    with pytest.raises(ValueError, match=r"captions are missing for 1 of 4 images .* first 'new.png'"):
        Images(folder_config(captioned))


def test_absent_images_are_named(captioned: Path) -> None:
    (captioned / "z.jpg").unlink()
    with pytest.raises(ValueError, match=r"names 1 absent images, first 'z\.jpg'"):
        Images(folder_config(captioned))


@pytest.mark.parametrize("line", ["{not json", '{"text": "no name"}', '"text"', "[1]"])
def test_broken_metadata_lines_are_numbered(captioned: Path, line: str) -> None:
    with open(captioned / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"line 5 of metadata.jsonl in .* is no JSON(:| object with a file_name)"):
        Images(folder_config(captioned))


def test_empty_captions_are_errors(captioned: Path) -> None:
    write_metadata(captioned, [{"file_name": name, "text": " "} for name in ("x.png", "deep/y.webp", "z.jpg")])
    with pytest.raises(ValueError, match=r"the caption of 'x\.png' is ' ', expected a text that is not empty"):
        Images(folder_config(captioned))


def test_captions_without_metadata_are_an_error(classes: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl"):
        Images(folder_config(classes, caption_column="text"))


def test_folders_that_cannot_be_read(tmp_path: Path, classes: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; give a folder of images or a zip archive"):
        Images(folder_config(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="no images found in"):
        Images(folder_config(tmp_path / "empty"))
    with pytest.raises(ValueError, match="neither a folder nor a zip archive"):
        Images(folder_config(tmp_path / "empty" / "notes.txt"))
    write_image(classes / "loose.png")
    with pytest.raises(ValueError, match="mixes class folders with images outside of them"):
        Images(folder_config(classes))


def test_a_flat_folder_has_neither_labels_nor_captions(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png")
    images = Images(folder_config(tmp_path))
    assert images[0].keys() == {"image", "skipped"}
    assert images.class_names is None
    assert not images.source.has_captions


def test_unreadable_images_are_named(classes: Path) -> None:
    (classes / "a" / "1.png").write_bytes(b"not a picture")
    images = Images(folder_config(classes))
    assert images[0]["label"] == 0
    with pytest.raises(ValueError, match=r"cannot read the image .*data/a/1\.png"):
        images[1]


def test_damaged_archives_and_removed_files_are_unreadable(classes: Path) -> None:
    archive = to_zip(classes)
    images = Images(folder_config(archive, on_error="skip"))
    with zipfile.ZipFile(archive) as opened:
        start = opened.getinfo("a/0.png").header_offset + 60
    data = bytearray(archive.read_bytes())
    data[start : start + 8] = b"damaged!"
    archive.write_bytes(data)
    assert "a/0.png" in images[0]["skipped"][0]
    images = Images(folder_config(classes))
    (classes / "a" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read the image .*a/0\.png"):
        images[0]


def test_cut_off_images_are_unreadable(classes: Path) -> None:
    rng = np.random.default_rng(0)
    whole = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    (classes / "a" / "0.png").write_bytes(whole.getvalue()[:5000])
    with pytest.raises(ValueError, match="cannot read the image"):
        Images(folder_config(classes))[0]


def test_errors_after_decoding_name_the_image_too(classes: Path) -> None:
    """Damaged EXIF data are read when a picture is turned upright."""
    Image.new("RGB", (8, 8), RED).save(classes / "a" / "0.png", exif=b"Exif\0\0no TIFF at all")
    message = r"cannot read the image .*a/0\.png: not a TIFF file"
    with pytest.raises(ValueError, match=message):
        Images(folder_config(classes))[0]
    skipped = Images(folder_config(classes, on_error="skip"))[0]["skipped"]
    assert len(skipped) == 1 and "a/0.png" in skipped[0]
    with pytest.raises(ValueError, match=message):
        list(open_images(classes, image_size=8).batches(8))


def test_unreadable_images_are_skipped_and_reported(classes: Path) -> None:
    (classes / "b" / "1.png").write_bytes(b"not a picture")
    images = Images(folder_config(classes, on_error="skip"))
    item = images[3]  # the last one, so the first takes its place
    assert item["label"] == 0
    assert len(item["skipped"]) == 1
    assert "b/1.png" in item["skipped"][0]
    batch = collate([images[i] for i in range(4)])
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["label"].tolist() == [0, 0, 1, 0]
    assert len(batch["skipped"]) == 1
    assert "caption" not in batch


def test_skipping_ends(classes: Path) -> None:
    for file in classes.rglob("*.png"):
        file.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="cannot read the image"):
        Images(folder_config(classes, on_error="skip"))[0]


def test_collate_keeps_captions(captioned: Path) -> None:
    images = Images(folder_config(captioned))
    batch = collate([images[0], images[2]])
    assert batch["caption"] == ["picture x", "picture z"]
    assert "label" not in batch


@pytest.mark.parametrize(("background", "colour"), [("white", 255), ("black", 0)])
def test_transparency_is_put_on_the_background(tmp_path: Path, background: str, colour: int) -> None:
    write_image(tmp_path / "half.png", (200, 100, 0, 128))
    write_image(tmp_path / "none.png", (200, 100, 0, 0))
    images = Images(folder_config(tmp_path, background=background))
    assert images[1]["image"].unique().tolist() == [colour]
    expected = [round((128 * value + 127 * colour) / 255) for value in (200, 100, 0)]
    assert images[0]["image"][:, 3, 3].tolist() == pytest.approx(expected, abs=1)


def test_random_backgrounds_belong_to_the_picture(tmp_path: Path) -> None:
    colours = [background_colour("random", 0, index) for index in range(200)]
    assert 70 < sum(colour == (255, 255, 255) for colour in colours) < 130
    assert len(set(colours)) > 60
    assert colours == [background_colour("random", 0, index) for index in range(200)]
    assert colours != [background_colour("random", 1, index) for index in range(200)]
    write_image(tmp_path / "none.png", (0, 0, 0, 0))
    image = Images(folder_config(tmp_path, background="random", seed=5))[0]["image"]
    assert tuple(image[:, 0, 0].tolist()) == background_colour("random", 5, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert flatten(Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode), (255, 255, 255)).mode == "RGB"


def test_palette_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "p.gif", transparency=0)
    pixels = Images(folder_config(tmp_path, image_size=4))[0]["image"]
    assert pixels[:, 3, 3].tolist() == [255, 255, 255]
    assert pixels[:, 0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize("size", [(8, 8), (31, 8), (8, 30), (3, 5), (100, 99)])
def test_pictures_become_square_about_the_centre(size: tuple[int, int]) -> None:
    """Red grows to the right and green downwards, so the crop's means tell whether it is in the middle."""
    ramps = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    ramps[:, :, 0] = np.linspace(0, 255, size[0]).round()
    ramps[:, :, 1] = np.linspace(0, 255, size[1]).round()[:, None]
    result = fit(Image.fromarray(ramps), 8, 8)
    assert result.size == (8, 8)
    assert np.asarray(result)[:, :, :2].mean((0, 1)) == pytest.approx([127.5, 127.5], abs=14)  # half a pixel
    assert fit(result, 8, 8) is result


@pytest.mark.parametrize("size", [(8, 6), (31, 8), (8, 30), (3, 5), (100, 99)])
def test_pictures_cover_other_shapes_without_distortion(size: tuple[int, int]) -> None:
    """Of a ramp whose steps are the same in both directions, the result's steps are too."""
    x, y = np.arange(size[0]), np.arange(size[1])
    ramps = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    ramps[:, :, 0], ramps[:, :, 1] = x[None] * 2, y[:, None] * 2
    result = np.asarray(fit(Image.fromarray(ramps), 6, 8)).astype(float)
    assert result.shape == (6, 8, 3)
    scale = max(6 / size[1], 8 / size[0])
    for channel, axis in ((0, 1), (1, 0)):
        assert np.ptp(result[:, :, channel].mean(1 - axis)) <= 2 * (result.shape[axis] / scale)
    assert result[:, :, 0].mean() == pytest.approx(size[0] - 1, abs=1.5 / scale)
    assert result[:, :, 1].mean() == pytest.approx(size[1] - 1, abs=1.5 / scale)


def test_files_are_named_alike_in_folders_and_archives(captioned: Path) -> None:
    folder, archive = Files(str(captioned)), Files(str(to_zip(captioned)))
    assert folder.names == archive.names == ["deep/y.webp", "metadata.jsonl", "x.png", "z.jpg"]
    assert folder.images() == ["deep/y.webp", "x.png", "z.jpg"]
    assert folder.read("x.png") == archive.read("x.png")
    assert pickle.loads(pickle.dumps(archive)).read("x.png") == folder.read("x.png")


def test_drawings_are_a_source() -> None:
    images = Images(DataConfig(image_size=32, seed=4))
    item = images[5]
    assert item["image"].shape == (3, 32, 32)
    assert item.keys() == {"image", "caption", "label", "skipped"}
    assert images.class_names[item["label"]] in item["caption"]
    held_out = Images(DataConfig(image_size=32, seed=4), "validation")
    assert held_out[5]["caption"] != item["caption"]
    with pytest.raises(ValueError, match="'train' or 'validation', got 'test'"):
        open_source(DataConfig(), "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "folder"}, "data.path must name a folder or a zip archive"),
        ({"source": "datasets"}, "data.name must name a data set"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction must be in"),
    ],
)
def test_wrong_settings_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A parquet file of six pictures with captions and numbered labels, one label −1; its options."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows: dict[str, list[Any]] = {"picture": [], "title": [], "kind": [], "odd": [], "number": []}
    for i in range(6):
        rows["picture"].append(Image.new("RGBA" if i == 5 else "RGB", (6, 4), (40 * i, 0, 0, 0)[: 4 if i == 5 else 3]))
        rows["title"].append(f"number {i}")
        rows["kind"].append(i % 2)
        rows["odd"].append(i - 1)
        rows["number"].append(i)
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "title": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["even", "uneven"]),
            "odd": datasets.Value("int64"),
            "number": datasets.Value("int64"),
        }
    )
    path = tmp_path / "six.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return {
        "source": "datasets",
        "name": "parquet",
        "data_files": str(path),
        "image_column": "picture",
        "image_size": 4,
        "validation_fraction": 0.0,
    }


def test_named_data_sets(parquet: dict[str, Any]) -> None:
    images = Images(DataConfig(**parquet, caption_column="title", label_column="kind"))
    assert (len(images), images.class_names) == (6, ("even", "uneven"))
    items = [images[i] for i in range(6)]
    assert [item["caption"] for item in items] == [f"number {i}" for i in range(6)]
    assert [item["label"] for item in items] == [0, 1, 0, 1, 0, 1]
    assert [int(item["image"][0, 2, 2]) for item in items[:5]] == [0, 40, 80, 120, 160]
    assert items[5]["image"].unique().tolist() == [255]
    assert images.caption(3) == "number 3"
    assert images.source.size(3) == (4, 6)


def test_named_data_sets_without_captions_or_labels(parquet: dict[str, Any]) -> None:
    images = Images(DataConfig(**parquet))
    assert images[0].keys() == {"image", "skipped"}
    assert images.class_names is None


def test_named_data_sets_with_template_names_and_where(parquet: dict[str, Any]) -> None:
    options = {"caption_template": "{title} of {kind}", "where": {"number": [1, 4]}, "class_names": ["E", "U"]}
    images = Images(DataConfig(**parquet, label_column="kind", **options))
    assert [images[i]["caption"] for i in range(len(images))] == ["number 1 of 1", "number 4 of 0"]
    assert images.class_names == ("E", "U")
    assert Images(DataConfig(**parquet, label_column="number")).class_names == tuple("012345")


def test_named_data_sets_with_more_ways_to_say_it(parquet: dict[str, Any]) -> None:
    options = {"caption_column": "title", "more_caption_templates": ["a {title}"], "validation_fraction": 0.5}
    train, held_out = (Images(DataConfig(**{**parquet, **options}), split) for split in ("train", "validation"))
    assert len(train) == 2 * (6 - len(held_out))
    for i in range(0, len(train), 2):
        assert train[i + 1]["caption"] == train.caption(i + 1) == "a " + train[i]["caption"]
        assert torch.equal(train[i]["image"], train[i + 1]["image"])
    assert held_out[0]["caption"].startswith("number")


def test_named_data_sets_have_splits(parquet: dict[str, Any]) -> None:
    train, held_out = (
        Images(DataConfig(**{**parquet, "validation_fraction": 0.5}), s) for s in ("train", "validation")
    )
    assert len(train) + len(held_out) == 6
    assert 0 < len(held_out) < 6
    own = Images(DataConfig(**parquet, validation_split="train[:2]"), "validation")
    assert len(own) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_column": "text"}, "data.caption_column is 'text', but 'parquet' has the columns picture, title"),
        ({"label_column": "text"}, "data.label_column is 'text'"),
        ({"image_column": "image"}, "data.image_column is 'image'"),
        ({"where": {"text": ["a"]}}, "data.where names the column 'text'"),
        ({"where": {"number": [77]}}, "no rows are left"),
        ({"label_column": "kind", "class_names": ["one"]}, "1 names, but the data has 2 classes"),
        ({"train_split": "training"}, "cannot load the data set 'parquet', split 'training'"),
        ({"data_files": "/nowhere/at_all.parquet"}, "cannot load the data set 'parquet'"),
    ],
)
def test_named_data_sets_that_do_not_fit(parquet: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Images(DataConfig(**{**parquet, **options}))


def test_labels_out_of_range_are_named_at_the_start(parquet: dict[str, Any]) -> None:
    place = "data.label_column 'odd' of 'parquet' has in the split"
    with pytest.raises(ValueError, match=f"{place} 'train' the label -1, first in row 0, expected .* from 0 to 4"):
        Images(DataConfig(**parquet, label_column="odd"))
    images = Images(DataConfig(**parquet, label_column="odd", where={"odd": [0, 1, 2, 3, 4]}))
    assert [images[i]["label"] for i in range(len(images))] == [0, 1, 2, 3, 4]
    smaller = {"train_split": "train[1:3]", "validation_split": "train[2:]", "where": {"odd": [0, 2, 3, 4]}}
    with pytest.raises(ValueError, match=r"'train\[2:\]' the label 2, first in row 1, .* 0 to 1, .* data\.where"):
        Images(DataConfig(**parquet, label_column="odd", **smaller), "validation")


def test_columns_are_chosen_once(parquet: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the copies that reading processes get."""
    import datasets

    images = Images(DataConfig(**parquet, caption_column="title"))

    def slow(*_: object, **__: object) -> None:
        raise AssertionError("columns were chosen anew")

    for name in ("remove_columns", "select_columns"):
        monkeypatch.setattr(datasets.Dataset, name, slow)
    for data in (images, pickle.loads(pickle.dumps(images))):
        assert (data.caption(3), data.source.size(3)) == ("number 3", (4, 6))
        assert int(data[3]["image"][0, 2, 2]) == 120


def test_unreadable_pictures_of_named_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    whole = io.BytesIO()
    Image.new("RGB", (4, 4), RED).save(whole, "PNG")
    gone = tmp_path / "gone.png"
    rows = [{"bytes": whole.getvalue(), "path": None}, {"bytes": b"broken", "path": "broken.png"}]
    rows += [{"bytes": None, "path": str(gone)}, None]
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": rows}, features=features)
    pq.write_table(data.data.table, tmp_path / "four.parquet")
    options = {"source": "datasets", "name": "parquet", "data_files": str(tmp_path / "four.parquet"), "image_size": 4}
    images = Images(DataConfig(**options, validation_fraction=0.0))
    assert images[0]["image"][:, 0, 0].tolist() == list(RED)
    with pytest.raises(ValueError, match=r"cannot read the image broken\.png"):
        images[1]
    with pytest.raises(ValueError, match=r"cannot read the image .*gone.png"):
        images[2]
    with pytest.raises(ValueError, match=r"parquet\[3\] has no image"):
        images[3]
    skipping = Images(DataConfig(**options, validation_fraction=0.0, on_error="skip"))
    assert len(skipping[1]["skipped"]) == 3


def test_rotated_and_16_bit_pictures():
    picture = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    assert flatten(Image.open(file), (0, 0, 0)).size == (2, 3)
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        file = io.BytesIO()
        picture.save(file, kind, exif=exif)
        data = file.getvalue()
        upright = flatten(Image.open(io.BytesIO(data)), (0, 0, 0))
        assert read_size(lambda data=data: io.BytesIO(data), kind) == (upright.height, upright.width) == (3, 2), kind
    deep = Image.fromarray(np.array([[0, 256 * 7, 2**16 - 1]], dtype=np.uint16))
    assert np.asarray(flatten(deep, (0, 0, 0)))[0, :, 0].tolist() == [0, 7, 255]

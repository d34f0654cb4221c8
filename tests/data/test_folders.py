"""What folders mean: wrapping folders, splits, classes; and that no picture is left out without a word."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tarflow.common.arguments import parse_dataclass
from tarflow.data import formats
from tarflow.data.captions import readable_names
from tarflow.data.config import DataConfig
from tarflow.data.files import Files, archive_length, list_folder
from tarflow.data.folder import ImageFolder, check_pictures
from tarflow.data.images import Images
from tarflow.data.layout import place_pictures, split_of
from tarflow.evaluation.images.sets import open_images
from tarflow.pipeline.call.inputs import label_indices
from tarflow.pipeline.call.labels import labels_by_name
from tarflow.training.flow.arguments import parse_config

DOUBLE = b"\0\5\x16\7" + b"\0" * 60  # what macOS writes beside files


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(folder / name)
    return folder


def config(path: Path, **options: Any) -> DataConfig:
    return DataConfig(source="folder", path=str(path), **{"image_size": 4, "validation_fraction": 0.0, **options})


def found(path: Path, **options: Any) -> tuple[Any, list[str], list[str]]:
    """Classes, training and held-out pictures."""
    splits = [ImageFolder(config(path, **options), split) for split in ("train", "validation")]
    return splits[0].class_names, *([row.name for row in data.rows] for data in splits)


def zipped(path: Path, files: dict[str, bytes | Path]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content.read_bytes() if isinstance(content, Path) else content)
    return path


@pytest.mark.parametrize(
    ("names", "classes", "held_out"),
    [
        ("train/cat/0.png train/dog/1.png val/cat/2.png", "cat dog", "val/cat/2.png"),
        ("Train/cat/0.png Train/dog/1.png Val/cat/2.png", "cat dog", "Val/cat/2.png"),
        ("train/cat/0.png train/dog/1.png valid/cat/2.png test/dog/3.png", "cat dog", "test/dog/3.png valid/cat/2.png"),
        ("training/cat/0.png evaluation/dog/2.png", "cat dog", "evaluation/dog/2.png"),
        ("my/train/cat/0.png my/val/dog/1.png", "cat dog", "my/val/dog/1.png"),
        ("a/b/cat/0.png a/b/dog/1.png", "cat dog", ""),
        ("images/train/cat/0.png images/train/dog/1.png", "cat dog", ""),
        ("train/images/cat/0.png val/images/dog/1.png", "cat dog", "val/images/dog/1.png"),
        ("cat/0.png", "cat", ""),
        ("cat/0.png cat/more/1.png dog/2.png", "cat dog", ""),
        ("trains/0.png buses/1.png", "buses trains", ""),
        ("train/0.png val/1.png", "", "val/1.png"),
        ("train/0.png train/1.png", "", ""),
    ],
)
def test_the_rule(tmp_path: Path, names: str, classes: str, held_out: str) -> None:
    """The same for folders and archives."""
    folder, validation = write(tmp_path / "data", *names.split()), set(held_out.split())
    archive = zipped(tmp_path / "data.zip", {name: folder / name for name in names.split()})
    for path in (folder, archive):
        found_classes, *splits = found(path)
        assert found_classes == (tuple(classes.split()) or None)
        assert [set(split) for split in splits] == [set(names.split()) - validation, validation]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("bus/0.png car/1.png train/2.png", r"named as splits \(train\) beside others \(bus, car\)"),
        ("control/0.png test/1.png", r"named as splits \(test\) beside others \(control\)"),
        ("train/a/0.png val/a/1.png unlabeled/2.png", r"named as splits \(train, val\) beside others \(unlabeled\)"),
        ("train/a/0.png loose.png", r"named as splits \(train\) beside others \(pictures outside of folders\)"),
        ("val/a/0.png test/b/1.png", "no images are left .*its split folders are for validation"),
        ("cat/0.png dog/1.png loose.png", "mixes class folders with images outside of them, 'loose.png'"),
        ("train/cat/0.png train/1.png", "mixes class folders with images outside of them, 'train/1.png'"),
        ("all/cat/0.png all/dog/1.png all/loose.png", r"one folder 'all' with images both in it, 'all/loose\.png'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, names: str, message: str) -> None:
    write(tmp_path, *names.split())
    with pytest.raises(ValueError, match=message):
        found(tmp_path)


def test_it_can_be_said_what_is_meant(tmp_path: Path) -> None:
    vehicles = write(tmp_path / "vehicles", "bus/0.png", "car/1.png", "train/2.png")
    assert found(vehicles, split_folders="none") == (
        ("bus", "car", "train"),
        ["bus/0.png", "car/1.png", "train/2.png"],
        [],
    )
    assert found(vehicles, split_folders="only") == (None, ["train/2.png"], [])
    mixed = write(tmp_path / "mixed", "train/a/0.png", "train/b/1.png", "val/a/2.png", "unlabeled/3.png")
    assert found(mixed, split_folders="only") == (("a", "b"), ["train/a/0.png", "train/b/1.png"], ["val/a/2.png"])
    splits = write(tmp_path / "splits", "train/0.png", "test/1.png")
    assert found(splits, split_folders="none")[0] == ("test", "train")
    with pytest.raises(ValueError, match=r"split_folders is 'only', but .* has no folder train, val or the like"):
        found(write(tmp_path / "classes", "a/0.png", "b/1.png"), split_folders="only")
    parsed, _ = parse_dataclass(DataConfig, ["--source", "folder", "--path", "x", "--split_folders", "none"])
    assert parsed.split_folders == "none"


def test_names_of_splits() -> None:
    assert [split_of(name) for name in ("TRAIN", "Valid", "dev", "testing", "trains", "")] == [
        "train",
        "validation",
        "validation",
        "validation",
        None,
        None,
    ]
    assert place_pictures([], "nowhere") == []


def test_sets_for_evaluation_have_the_same_splits(tmp_path: Path) -> None:
    write(tmp_path, "wrapped/Train/0.png", "wrapped/Valid/1.png", "wrapped/Valid/2.png")
    assert len(open_images(tmp_path)) == 3
    assert open_images(tmp_path, "train").names == ["wrapped/Train/0.png"]
    assert len(open_images(tmp_path, "validation")) == 2
    with pytest.raises(ValueError, match="no pictures of the split 'validation'"):
        open_images(write(tmp_path / "half", "train/0.png"), "validation")


def test_files_of_systems_are_no_pictures(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "data",
        "train/cat/0.png",
        "train/dog/1.png",
        "val/cat/2.png",
        ".ipynb_checkpoints/a.png",
        "train/.ipynb_checkpoints/0-checkpoint.png",
        "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "#recycle/old.png",
        "$RECYCLE.BIN/old.png",
    )
    (folder / "train" / "cat" / "._0.png").write_bytes(DOUBLE)
    (folder / "train" / "Thumbs.db").write_bytes(DOUBLE)
    expected = (("cat", "dog"), ["train/cat/0.png", "train/dog/1.png"], ["val/cat/2.png"])
    assert found(folder) == expected
    files: dict[str, Any] = {name: folder / name for name in (*expected[1], *expected[2])}
    files |= {f"__MACOSX/train/cat/._{i}.png": DOUBLE for i in range(2)} | {"train/.DS_Store": DOUBLE}
    assert found(zipped(tmp_path / "finder.zip", files)) == expected


def test_captions_beside_files_of_systems(tmp_path: Path) -> None:
    picture = write(tmp_path, "0.png") / "0.png"
    files = {"metadata.jsonl": b'{"file_name": "0.png", "text": "t"}', "0.png": picture, "__MACOSX/._0.png": DOUBLE}
    files |= {"__MACOSX/._metadata.jsonl": DOUBLE}
    images = Images(config(zipped(tmp_path / "finder.zip", files)))
    assert [images[i]["caption"] for i in range(len(images))] == ["t"]


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "disk", "cat/0.png", "cat/deep/1.png")
    folder = write(tmp_path / "data", "bird/2.png")
    (folder / "cat").symlink_to(tmp_path / "disk" / "cat")
    (tmp_path / "disk" / "cat" / "again").symlink_to(tmp_path / "disk" / "cat")
    (folder / "bird" / "all").symlink_to(folder)
    (folder / "bird" / "3.png").symlink_to(tmp_path / "disk" / "cat" / "0.png")
    names = ["bird/2.png", "bird/3.png", "cat/0.png", "cat/deep/1.png"]
    assert found(folder) == (("bird", "cat"), names, [])
    (tmp_path / "link").symlink_to(folder)
    assert found(tmp_path / "link") == (("bird", "cat"), names, [])


def test_links_to_nowhere_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "a/0.png")
    (folder / "a" / "1.png").symlink_to(tmp_path / "gone.png")
    images = Images(config(folder))
    assert len(images) == 2
    with pytest.raises(ValueError, match=r"cannot read the image .*a/1\.png"):
        images[1]
    assert "a/1.png" in Images(config(folder, on_error="skip"))[1]["skipped"][0]


@pytest.mark.parametrize("target", ["gone", "a/0.png/dog", "dog"])
def test_folders_whose_link_leads_nowhere_are_refused(tmp_path: Path, target: str) -> None:
    """A class would be left out; the last link leads to itself."""
    folder = write(tmp_path, "a/0.png", "b/0.png")
    link = folder / "dog"
    link.symlink_to(folder / target)
    with pytest.raises(ValueError, match=r"the link '.*/dog' leads nowhere: mend or remove it"):
        Files(str(folder))
    link.unlink()
    for name in (".dog", "Thumbs.db"):  # no data
        (folder / name).symlink_to(tmp_path / "gone")
    assert Files(str(folder)).names == ["a/0.png", "b/0.png"]


def test_pictures_that_link_to_themselves_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "a/0.png")
    (folder / "a" / "1.png").symlink_to(folder / "a" / "1.png")
    with pytest.raises(ValueError, match=r"cannot read the image .*a/1\.png"):
        Images(config(folder))[1]


def test_names_are_sorted_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(str(write(tmp_path, "a/0.png", "b/1.JPG")))
    seen: list[str] = []
    monkeypatch.setattr("tarflow.data.files.suffix", lambda name: seen.append(name) or formats.suffix(name))
    for _ in range(2):
        assert (files.images(), files.unreadable_images(), files.other_images()) == (["a/0.png", "b/1.JPG"], [], [])
    assert seen == files.names
    files.images().clear()  # a copy
    assert files.images() == files.names


def test_both_splits_are_of_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(write(tmp_path, *(f"a{' b' * (i % 2)}/{i}.png" for i in range(40))), validation_fraction=0.3)
    expected = Images(data, "validation").source.rows
    listed: list[Path] = []
    listing = list_folder
    monkeypatch.setattr("tarflow.data.files.list_folder", lambda top: listed.append(top) or listing(top))
    train = Images(data, "train")
    held_out = Images(data, "validation", train)
    assert (listed, held_out.source.rows, held_out.class_names) == ([tmp_path], expected, train.class_names)
    assert len(train) + len(held_out) == 40
    assert gc.isenabled()
    assert held_out[0]["label"] == expected[0].label
    names = [row.name for row in train.source.every]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert names != sorted(names)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("a/b.JPG", ".jpg"),
        ("a.b/c", ""),
        ("a.tar.gz", ".gz"),
        (".png", ""),
        ("a/.png", ""),
        ("a/..png", ""),
        ("a/b..png", ".png"),
        ("a b.Webp", ".webp"),
    ],
)
def test_suffixes(name: str, end: str) -> None:
    assert formats.suffix(name) == end


def test_closed_folders_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "cat/0.png", "dog/1.png")
    scandir = os.scandir

    def closed(path: Any) -> Any:  # tests may run as root, who may read everything
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"the folder '.*dog/?' cannot be read \(Permission denied\): allow it"):
        Images(config(tmp_path))


def test_every_format_that_pillow_reads(tmp_path: Path) -> None:
    write(tmp_path, "cat/0.png")
    for end in (".jfif", ".jpe", ".JPG", ".jfi", ".ppm", ".tga"):
        Image.new("RGB", (4, 4)).save(tmp_path / "cat" / f"x{end}", {".ppm": "PPM", ".tga": "TGA"}.get(end, "JPEG"))
    images = Images(config(tmp_path))
    assert len([images[i] for i in range(len(images))]) == 7
    if ".avif" in formats.readable_suffixes():
        Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "y.avif")
        assert len(Images(config(tmp_path))) == 8


def test_formats_without_a_plug_in_are_refused_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = formats.readable_suffixes() - {".heic"}
    monkeypatch.setattr("tarflow.data.files.readable_suffixes", lambda: known)
    write(tmp_path, "cat/0.png", "dog/1.png")
    for i in range(3):
        (tmp_path / "cat" / f"{i}.HEIC").write_bytes(b"pictures of a telephone")
    with pytest.raises(ValueError, match=r"3 images in .* \(3 \.heic\), first 'cat/0\.HEIC': install Pillow's plug-in"):
        Images(config(tmp_path))
    with pytest.raises(ValueError, match=r"\(3 \.heic\)"):
        open_images(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(Images(config(tmp_path, on_error="skip"))) == 2
        Images(config(tmp_path, on_error="skip"), "validation")
    assert [record.message.split(": ")[1][:27] for record in caplog.records] == ["3 .heic files are left out,"]
    rows = [{"file_name": name, "text": "t"} for name in ("cat/0.png", "dog/1.png", "cat/0.HEIC")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(Images(config(tmp_path, on_error="skip"))) == 2
    shutil.rmtree(tmp_path / "dog")
    (tmp_path / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"no images found in .* 3 \.heic are not read here"):
        Images(config(tmp_path, on_error="skip"))


def test_drawings_and_raw_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "cat/0.png")
    for name in ("0.svg", "1.CR2", "notes.txt"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert len(Images(config(tmp_path))) == 1
    assert "1 .cr2, 1 .svg files are left out, as their formats are not read here" in caplog.text


def test_unsafe_and_double_names_of_archives(tmp_path: Path) -> None:
    picture = write(tmp_path, "0.png") / "0.png"
    other = write(tmp_path, "other_0.png") / "other_0.png"
    for name in ("../a/0.png", "/a/0.png", "a/../../0.png", "C:/a/0.png", "..\\a\\0.png"):
        with pytest.raises(ValueError, match="has a name outside of itself"):
            Files(str(zipped(tmp_path / "unsafe.zip", {name: picture})))
    for content, fine in ((picture, True), (other, False)):
        with zipfile.ZipFile(tmp_path / "double.zip", "w") as archive:
            archive.write(picture, "a/0.png")
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.write(content, "a/0.png")
        if fine:
            assert Files(str(tmp_path / "double.zip")).names == ["a/0.png"]
        else:
            with pytest.raises(ValueError, match=r"two different files of the name 'a/0\.png'"):
                Files(str(tmp_path / "double.zip"))
    windows = zipped(tmp_path / "windows.zip", {"cat\\0.png": picture, ".\\dog\\1.png": other})
    assert found(windows)[:2] == (("cat", "dog"), ["cat/0.png", "dog/1.png"])
    assert Images(config(windows))[0]["image"].shape == (3, 4, 4)


def test_links_and_passwords_in_archives(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a/0.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "../b/0.png")
    with pytest.raises(ValueError, match=r"holds links, 'a/0\.png': pack the files themselves"):
        Files(str(tmp_path / "link.zip"))
    data = bytearray(zipped(tmp_path / "locked.zip", {"a/0.png": b"secret"}).read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(ValueError, match="is encrypted: unpack it"):
        Files(str(tmp_path / "locked.zip"))


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    write(tmp_path, "0.png")
    try:
        shutil.copy(tmp_path / "0.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    splits = [Images(config(tmp_path, validation_fraction=0.5), split) for split in ("train", "validation")]
    assert sum(len(split) for split in splits) == 2
    assert len(open_images(tmp_path).fingerprint) == 64
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"broken")
    images = Images(config(tmp_path))
    with pytest.raises(ValueError, match=r"cannot read the image .*caf\\xe9\.png") as error:
        [images[i] for i in range(2)]
    str(error.value).encode()  # can be printed everywhere
    os.rename(tmp_path / "0.png", os.fsencode(tmp_path) + b"/1.png")
    os.mkdir(os.fsencode(tmp_path) + b"/b\xe9b\xe9")
    for name in ("1.png", os.fsdecode(b"caf\xe9.png")):
        (tmp_path / name).rename(tmp_path / os.fsdecode(b"b\xe9b\xe9") / name)
    with pytest.raises(ValueError, match="has a name that is no UTF-8"):
        Images(config(tmp_path))


def captioned(folder: Path, rows: list[Any], encode: Callable[[str], bytes] = str.encode) -> Path:
    write(folder, *{row["file_name"] for row in rows if isinstance(row["file_name"], str)})
    (folder / "metadata.jsonl").write_bytes(encode("\n".join(json.dumps(row, ensure_ascii=False) for row in rows)))
    return folder


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_at_line_feeds_alone(tmp_path: Path, separator: str, mark: str) -> None:
    captions = ["a dog", f"a cat{separator}on a mat"]
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(captions)]
    folder = captioned(tmp_path, rows, lambda text: (mark + text.replace("\n", "\r\n")).encode())
    assert [row.caption for row in ImageFolder(config(folder)).rows] == captions


def test_texts_of_other_encodings_are_named(tmp_path: Path) -> None:
    captioned(tmp_path, [{"file_name": "0.png", "text": "café"}], lambda text: text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 1 of metadata\.jsonl in .* is no UTF-8 text"):
        ImageFolder(config(tmp_path))


@pytest.mark.parametrize("name", [["0.png"], 3, None, {"a": 1}])
def test_file_names_that_are_no_texts(tmp_path: Path, name: Any) -> None:
    captioned(tmp_path, [{"file_name": "0.png", "text": "a"}, {"file_name": name, "text": "b"}])
    with pytest.raises(ValueError, match=r"line 2 of metadata\.jsonl in .* has the file_name .*, expected a text"):
        ImageFolder(config(tmp_path))


def test_several_captions_of_one_picture(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}, said {way}"} for way in range(2) for i in range(20)]
    captioned(tmp_path, rows)
    splits = [ImageFolder(config(tmp_path, validation_fraction=0.4), split).rows for split in ("train", "validation")]
    assert sorted(row.caption for split in splits for row in split) == sorted(row["text"] for row in rows)
    assert all(splits)
    assert not {row.name for row in splits[0]} & {row.name for row in splits[1]}


def test_captions_in_wrapping_and_split_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        captioned(tmp_path / "data" / split, [{"file_name": f"{split}_0.png", "text": f"a {split}"}])
    for split, names in (("train", ["train/train_0.png"]), ("validation", ["val/val_0.png"])):
        data = ImageFolder(config(tmp_path / "data"), split)
        assert [row.name for row in data.rows] == names
        assert data.rows[0].caption == "a " + names[0].split("/")[0]
    files = {f"my/{file.name}": file for file in (tmp_path / "data" / "train").iterdir()}
    data = ImageFolder(config(zipped(tmp_path / "my.zip", files)))
    assert [(row.name, row.caption) for row in data.rows] == [("my/train_0.png", "a train")]


def test_captioned_pictures_outside_of_splits_are_refused(tmp_path: Path) -> None:
    captioned(tmp_path, [{"file_name": name, "text": name} for name in ("train/0.png", "val/1.png", "other/2.png")])
    with pytest.raises(ValueError, match=r"named as splits \(train, val\) beside others \(other\)"):
        found(tmp_path)
    assert found(tmp_path, split_folders="only") == (None, ["train/0.png"], ["val/1.png"])
    assert len(found(tmp_path, split_folders="none")[1]) == 3


def test_names_in_other_spellings(tmp_path: Path) -> None:
    """Accents in two parts, as macOS writes them, ``./`` before a name, and backslashes."""
    apart = unicodedata.normalize("NFD", "é.png")
    write(tmp_path, apart, "a/0.png", "1.png")
    names = ["é.png", "a\\0.png", "./1.png"]
    rows = [json.dumps({"file_name": name, "text": name}, ensure_ascii=False) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert [row.name for row in ImageFolder(config(tmp_path)).rows] == [apart, "a/0.png", "1.png"]


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        (
            {"text": "a", "style": None},
            "{text}, {style}",
            "has no value in the column 'style', which its caption needs",
        ),
        ({"text": None}, None, "the caption of '0.png' is None, expected a text"),
        ({"text": "a"}, "{text", r"the caption template '\{text' "),
        ({"text": "a"}, "{text} {}", r"the caption template '\{text\} \{\}' does not fit"),
        ({"text": "a"}, "{text.size}", "does not fit the row of '0.png'"),
    ],
)
def test_captions_that_cannot_be_made(tmp_path: Path, row: dict, template: str | None, message: str) -> None:
    captioned(tmp_path, [{"file_name": "0.png", **row}])
    with pytest.raises(ValueError, match=message):
        ImageFolder(config(tmp_path, caption_template=template))


def test_numbers_as_class_names(tmp_path: Path) -> None:
    write(tmp_path / "data", "1/0.png", "2/0.png")
    settings = tmp_path / "c.yaml"
    settings.write_text(
        f"output: out\ndata: {{source: folder, path: {tmp_path / 'data'}, class_names: {{1: one, 2: 22}}}}\n"
    )
    parsed, _ = parse_config(["--config", str(settings)])
    assert Images(parsed.data).class_names == ("one", "22")
    settings.write_text("output: out\ndata: {source: folder, path: x, class_names: [1, two], where: {size: [3]}}\n")
    parsed, _ = parse_config(["--config", str(settings)])
    assert (parsed.data.class_names, parsed.data.where) == (["1", "two"], {"size": [3]})
    settings.write_text("output: out\ndata: {class_names: {cat: no}}\n")
    with pytest.raises(ValueError, match=r"data\.class_names"):
        parse_config(["--config", str(settings)])
    with pytest.raises(ValueError, match=r"lacks the classes 02; it has '1', '2'\..* in YAML, put names .* in quotes"):
        readable_names(["1", "02"], {"1": "one", "2": "two"})
    with pytest.raises(ValueError, match="1 names stand for several classes, first 'crane'"):
        readable_names(["bird", "machine"], ["crane", "crane"])


def test_classes_that_differ_in_capitals(tmp_path: Path) -> None:
    write(tmp_path, "A/0.png", "a/1.png", "Dog/2.png")
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system does not tell capitals")
    names = ImageFolder(config(tmp_path)).class_names
    labels = labels_by_name(dict(enumerate(names)))
    assert names == ("A", "Dog", "a")
    assert label_indices(["A", "a", "dog", "DOG", "Dog"], labels, 3) == [0, 2, 1, 1, 1]
    labels = labels_by_name({"0": "Cat", "1": "CAT"})
    assert label_indices(["Cat", "CAT"], labels, 2) == [0, 1]
    with pytest.raises(ValueError, match="unknown class name 'cat'; known are Cat, CAT"):
        label_indices("cat", labels, 2)


def test_an_archive_without_pictures_is_told_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zipped(tmp_path / "texts.zip", {"a/0.txt": b"x", "a/1.txt": b"y"})
    with zipfile.ZipFile(archive, "a") as opened:
        opened.comment = b"of no pictures" * 4000
    assert archive_length(archive) == 2
    with pytest.raises(ValueError, match=r"no images found in .*texts\.zip"):
        check_pictures(config(archive))
    with pytest.raises(ValueError, match="no images found in"):
        check_pictures(config(zipped(tmp_path / "empty.zip", {})))
    check_pictures(config(zipped(tmp_path / "good.zip", {"0.png": b""})))
    other = zipped(tmp_path / "other.zip", {"0.png": b"", "1.heic": b""})
    with pytest.raises(ValueError, match="formats that cannot be read here"):
        check_pictures(config(other))
    check_pictures(config(other, on_error="skip"))
    monkeypatch.setattr("tarflow.data.folder.FEW_FILES", 1)
    check_pictures(config(archive))  # many files are listed once, when the data is opened


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": {"style": ["noto"]}}, r"data\.where chooses rows of a metadata\.jsonl, but '.*' has none"),
        ({"label_column": "kind"}, "data.label_column is 'kind', but the classes of a folder are the folders in it"),
        (
            {"validation_split": "cat"},
            "data.validation_split is 'cat', but a folder's splits are its folders train and",
        ),
    ],
)
def test_settings_that_folders_do_not_have_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write(tmp_path, "cat/0.png", "dog/1.png")
    with pytest.raises(ValueError, match=message):
        ImageFolder(config(tmp_path, **options))


def test_half_a_character_in_a_caption_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png")
    lines = [{"file_name": "a.png", "text": "whole \U0001f600"}, {"file_name": "b.png", "text": "cut \ud83d"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"the caption of 'b\.png' is 'cut \\ud83d', which has half of a character"):
        ImageFolder(config(tmp_path))

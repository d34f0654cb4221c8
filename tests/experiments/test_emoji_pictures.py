"""Copies of captioned emoji, cut anew and called otherwise."""

from __future__ import annotations

import json
import random
import zipfile

import numpy as np
import pytest
from PIL import Image

from tarflow.data.folder import is_held_out
from tarflow.experiments import emoji_pictures
from tarflow.experiments.emoji_pictures import captions_of, has_tone, write_emoji_pictures
from tarflow.scripts.emoji_pictures import main


@pytest.fixture
def archive(tmp_path):
    """An archive of a blue square on nothing, for each of some names in a style."""
    rows = [
        {"text": f"{colour} {thing}", "style": style, "keywords": [thing, "colour"]}
        for colour in ("blue", "red", "green", "black", "white", "brown")
        for thing in ("heart", "car", "apple", "book", "circle", "square", "hat", "bird", "ball")
        for style in ("twemoji", "blob")
    ]
    rows += [
        {"text": "ghost", "style": style, "keywords": []} for style in ("twemoji", "blob")
    ]  # of which none is seen
    rows += [{"text": "waving hand dark", "style": "blob", "keywords": []}, {"text": "sun", "style": "openmoji"}]
    path = tmp_path / "emoji.zip"
    picture = Image.new("RGBA", (72, 72))
    picture.paste((0, 0, 255, 255), (18, 18, 54, 54))
    picture.save(tmp_path / "one.webp", lossless=True)
    with zipfile.ZipFile(path, "w") as archive:
        for number, row in enumerate(rows):
            row["file_name"] = f"{row['style']}/{number}.webp"
            archive.write(tmp_path / "one.webp", row["file_name"])
        archive.writestr("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def written(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_each_picture_has_copies_unless_it_is_held_out(archive, tmp_path):
    path, rows = archive
    count = write_emoji_pictures([str(path)], tmp_path / "out", processes=1)
    made = written(tmp_path / "out")
    assert count == len(made)
    held_out = {row["text"] for row in rows if is_held_out(f"{row['text']}, twemoji style", 0.03)}
    unseen = {row["text"] for row in rows if is_held_out(row["text"], 0.02)}
    assert held_out and unseen == {"ghost"}
    for row in rows:
        own = [one for one in made if one["text"] == row["text"] and one["style"] == row["style"]]
        if row["style"] == "openmoji":
            assert not own
        elif row["style"] == "twemoji" and row["text"] in held_out:
            assert [one["file_name"].split("/")[0] for one in own] == ["validation"]
            assert own[0]["caption"] == f"{row['text']}, twemoji style"
        elif row["text"] in unseen:
            assert not own
        else:
            assert len(own) == (2 if has_tone(row["text"]) else 5)
            assert all(one["file_name"].startswith("train/") for one in own)


def test_the_first_copy_is_the_whole_picture_and_the_others_are_not(archive, tmp_path):
    path, _ = archive
    write_emoji_pictures([str(path)], tmp_path / "out", processes=1)
    first = next(row for row in written(tmp_path / "out") if row["file_name"].endswith("_1.png"))["file_name"]
    whole, *others = (
        np.asarray(Image.open(tmp_path / "out" / first.replace("_1.png", f"_{copy}.png"))) for copy in range(5)
    )
    assert whole.shape == (64, 64, 3)
    assert (whole[0, 0] == 255).all() and (whole[32, 32] == [0, 0, 255]).all()
    blue = (whole[..., 0] < 128).sum()
    assert abs(blue - 32 * 32) <= 64
    for other in others:
        assert (other != whole).any()
        assert 0.8 < (other[..., 0] < 128).sum() / blue < 1.25  # of 0.92 to 1.08 of its side


def test_captions_say_the_name_its_keywords_and_single_words():
    row = {"text": "evergreen tree", "style": "noto", "keywords": ["evergreen tree", "forest", "tree"]}
    for seed in range(20):
        captions = captions_of(row, 5, {"evergreen tree"}, random.Random(seed))
        first, second, third, fourth, fifth = (caption.removesuffix(", noto style") for caption in captions)
        assert (first, third) == ("evergreen tree", "evergreen tree, forest, tree")
        assert second in ("an evergreen tree", "the evergreen tree")
        assert fourth in ("tree", "a tree", "the tree")
        assert fifth in ("forest", "a forest", "the forest")


def test_a_keyword_that_names_another_emoji_is_left_to_it():
    row = {"text": "sunset", "style": "noto", "keywords": ["dusk", "sun"]}
    words = {
        caption for seed in range(20) for caption in captions_of(row, 5, {"sun", "sunset"}, random.Random(seed))[3:]
    }
    assert words == {f"{words}, noto style" for words in ("dusk", "a dusk", "the dusk")}


def test_what_has_no_keywords_keeps_its_name():
    captions = captions_of({"text": "sun", "style": "noto"}, 4, {"sun"}, random.Random(0))
    assert {caption.split(", ")[0].split()[-1] for caption in captions} == {"sun"}
    assert captions[2] == captions[1]


def test_work_is_the_same_by_any_number_of_processes(archive, tmp_path, monkeypatch):
    path, _ = archive
    write_emoji_pictures([str(path)], tmp_path / "one", processes=1)
    monkeypatch.setattr(emoji_pictures, "AT_A_TIME", 7)
    write_emoji_pictures([str(path)], tmp_path / "two", processes=2)
    assert written(tmp_path / "one") == written(tmp_path / "two")


@pytest.mark.parametrize("row", [{"text": "sun"}, {"text": 3, "style": "noto"}, []])
def test_rows_without_what_is_needed_are_named(tmp_path, row):
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.jsonl", json.dumps(row | {"file_name": "a.png"} if row else row))
    with pytest.raises(
        ValueError, match=r"line 1 of metadata\.jsonl in '.*bad\.zip' has no text '(style|text|file_name)'"
    ):
        write_emoji_pictures([str(path)], tmp_path / "out")


def test_a_folder_that_is_not_empty_is_refused(archive, tmp_path, capsys):
    path, _ = archive
    with pytest.raises(SystemExit):
        main([str(path), "--out", str(tmp_path)])
    assert "is not empty: give a new folder" in capsys.readouterr().err

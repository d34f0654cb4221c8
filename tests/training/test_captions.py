"""Models of pictures and captions: ranks in closed form, what is held out, the training, the commands."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fid_helpers import save_clip, write_pictures
from helpers import files_of
from PIL import Image
from stream_helpers import row as tar_row
from stream_helpers import tar_bytes, tar_shards, write
from transformers import MobileNetV2Config, MobileNetV2Model, VisionTextDualEncoderModel, ViTImageProcessor

from tarflow.cli.main import main
from tarflow.data.config import DataConfig
from tarflow.data.stream.captioned import CaptionedRows
from tarflow.evaluation.features.caption_ranks import (
    caption_score,
    captions_before,
    chance_of,
    score_lines,
    score_of,
    without,
)
from tarflow.evaluation.features.clip_score import clip_score
from tarflow.evaluation.images.sets import open_images
from tarflow.training.captions import training
from tarflow.training.captions.config import CaptionModelConfig
from tarflow.training.captions.model import load_vision
from tarflow.training.captions.pairs import open_pairs
from tarflow.training.captions.training import contrastive_loss, train_captions

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (10, 10, 10)}
STYLES = ("flat", "round")


@pytest.mark.parametrize(("before", "places"), [(0, 1), (1, 1), (2, 1), (3, 2), (5, 2), (4, 5)])
def test_chances_are_those_of_all_draws(before: int, places: int) -> None:
    captions, among = 7, 4  # the right one and six others, of which 0 … before − 1 are nearer
    draws = list(itertools.combinations(range(captions - 1), among - 1))
    hits = [sum(other < before for other in draw) < places for draw in draws]
    assert chance_of(before, captions, among, places) == pytest.approx(sum(hits) / len(hits))


def test_many_pictures_are_ranked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, captions, own = torch.randn(7, 3), torch.randn(5, 3), torch.arange(7) % 5
    whole = captions_before(pictures, captions, own)
    monkeypatch.setattr("tarflow.evaluation.features.caption_ranks.TOGETHER", 3)
    assert captions_before(pictures, captions, own).tolist() == whole.tolist() and whole.max() > 0


def test_shares_of_embeddings_with_known_ranks() -> None:
    captions = torch.eye(4)
    pictures = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.4, 0, 0], [0, 0, 0, 0]])
    assert captions_before(pictures, captions, torch.tensor([0, 1, 3])).tolist() == [
        0,
        1,
        3,
    ]  # equal ones count as nearer
    score = score_of(pictures[:2], captions, torch.tensor([0, 1]), 4)
    assert (score.first, score.top5) == pytest.approx((0.5, 1.0))
    assert score.first_error == pytest.approx(0.5)
    assert score_of(pictures[:2], captions, torch.tensor([0, 1]), 2).first == pytest.approx((1 + 2 / 3) / 2)
    assert "right caption first   50.0 % ± 50.0" in score_lines(score)


def test_captions_of_several_pictures_count_once(tmp_path: Path) -> None:
    model, images = str(save_clip(tmp_path / "clip")), open_images(write_pictures(tmp_path / "a", 5))
    found = caption_score(images, ["a", "b", "a", "c", "b"], model, among=3, batch_size=2)
    assert (found.pictures, found.captions, found.among) == (5, 3, 3)
    assert 0 <= found.first <= found.top5 == 1
    for among, message in ((4, "among 4, but there are only 3 different ones"),):
        with pytest.raises(ValueError, match=message):
            caption_score(images, ["a", "b", "a", "c", "b"], model, among)


def test_parts_of_captions_are_left_out() -> None:
    assert without(["a cat, flat style", "a dog"], r", \w+ style$") == ["a cat", "a dog"]
    with pytest.raises(ValueError, match=r"remove '\(' is no regular expression"):
        without(["a"], "(")
    with pytest.raises(ValueError, match="leaves nothing of the caption 'a'"):
        without(["a"], ".*")


def emoji(folder: Path, more: int = 0) -> DataConfig:
    """Squares of each colour and shade in two styles; every other shade has its name in capitals in the second."""
    folder.mkdir()
    rows = []
    for (name, colour), shade, style in itertools.product(COLOURS.items(), range(4 + more), STYLES):
        text = f"{name} number {shade}"
        pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
        pixels[2:-2, 2:-2] = np.clip(np.array(colour) + 12 * shade, 0, 255)
        file = f"{len(rows)}.png"
        Image.fromarray(pixels).save(folder / file)
        spelled = text.upper() if style == "round" and shade % 2 else text
        rows.append({"file_name": file, "text": spelled, "style": style, "emoji": f"{name}{shade}", "keywords": [name]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return DataConfig(
        source="folder",
        path=str(folder),
        image_size=16,
        validation_fraction=0.15,
        caption_template="{text}, {style} style",
        more_caption_templates=["{keywords}, {style} style"],
    )


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small MobileNetV2 of random weights."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    model = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35, image_size=32, finegrained_output=False))
    for weight in model.parameters():
        if weight.ndim == 4:  # the usual start leaves nothing of a picture behind so many layers
            torch.nn.init.kaiming_normal_(weight)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def settings(tmp_path: Path, network: str, **changes: Any) -> CaptionModelConfig:
    small = {
        "width": 32,
        "projection": 16,
        "steps": 60,
        "batch_size": 32,
        "lr": 3e-3,
        "dropout": 0.0,
        "warmup_steps": 5,
    }
    given = {
        "vision": network,
        "output": str(tmp_path / "model"),
        "remove": r", \w+ style$",
        "concept": ["text", "emoji"],
    }
    return CaptionModelConfig(**{"data": emoji(tmp_path / "data"), **small, **given, **changes})


@pytest.mark.parametrize("concept", [[], ["text"], ["emoji"]])
def test_no_style_of_what_is_held_out_is_trained_on(tmp_path: Path, vision: str, concept: list[str]) -> None:
    train, held_out = open_pairs(settings(tmp_path, vision, concept=concept))
    assert held_out.first and train.left_out > 0
    seen = {caption.casefold() for caption in held_out.first}
    assert seen.isdisjoint(caption.casefold() for caption in train.first)
    assert len(train.indices) + train.left_out + len(held_out.indices) == 32  # each picture once
    assert all(len(captions) == 2 for captions in train.captions)  # the second by its keywords
    assert all("style" not in caption for captions in train.captions for caption in captions)


def test_a_column_holds_out_what_has_another_name(tmp_path: Path, vision: str) -> None:
    config = settings(tmp_path, vision, concept=["emoji"])
    path = tmp_path / "data/metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["text"] = f"{row['text']} {row['style']}"  # no name is that of another style
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train, held_out = open_pairs(config)
    names = {caption.casefold().rsplit(" ", 1)[0] for caption in held_out.first}
    assert train.left_out > 0
    assert names.isdisjoint(caption.casefold().rsplit(" ", 1)[0] for caption in train.first)


def test_all_rows_of_a_picture_hold_out_what_they_name(tmp_path: Path, vision: str) -> None:
    config = settings(tmp_path, vision, concept=["emoji"])
    path = tmp_path / "data/metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, *({**row, "emoji": ""} for row in rows)]))
    left_out = open_pairs(config)[0].left_out
    path.write_text("\n".join(map(json.dumps, rows)))
    assert left_out == open_pairs(config)[0].left_out > 0


def test_it_learns_and_is_a_model_of_transformers(
    tmp_path: Path, vision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, vision)
    losses: list[float] = []
    before = training.contrastive_loss

    def watched(*arguments: Any) -> Any:
        loss = before(*arguments)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(training, "contrastive_loss", watched)
    score = train_captions(config)
    assert losses[-1] < losses[0] - 0.3
    about = json.loads((tmp_path / "model/caption_model.json").read_text())
    assert about["held_out"]["first"] == score.first and about["left_out"] > 0
    modes = {file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert len(modes) == 1  # all may be read by whoever may read other new files
    model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "model")
    own, frozen = model.vision_model.state_dict(), load_vision(vision, None)[0].state_dict()
    assert own.keys() == frozen.keys() and all(torch.equal(own[name], value) for name, value in frozen.items())

    held_out = open_images(config.data, "validation")
    names = without([held_out.data.caption(i) for i in range(len(held_out))], config.remove)  # type: ignore[attr-defined]
    assert clip_score(held_out, names, config.output) >= 0
    again = caption_score(held_out, names, config.output, among=score.among)
    assert again.first == pytest.approx(score.first, abs=1e-6) and again.captions == score.captions

    def never(*_: Any) -> Any:
        raise AssertionError("the features are there")

    monkeypatch.setattr(training, "pooled_features", never)
    assert train_captions(config).first == pytest.approx(score.first, abs=1e-6)
    with pytest.raises(AssertionError, match="are there"):
        train_captions(settings_with(config, image_size=48))

    argv = ["evaluate", "captions", "--model", config.output, "--remove", str(config.remove), "--among", "2"]
    data = ["--data.source", "folder", "--data.path", str(config.data.path), "--data.image_size", "16"]
    data += ["--data.caption_template", str(config.data.caption_template), "--data.validation_fraction", "0.15"]
    main([*argv, *data, "--out", str(tmp_path / "score.json")])
    assert "right caption first" in capsys.readouterr().out
    assert json.loads((tmp_path / "score.json").read_text())["pictures"] == len(held_out)
    samples = write_pictures(tmp_path / "samples/00000", 4, size=(16, 16)).parent
    rows = [{"index": i, "caption": f"red number {i % 3}, flat style"} for i in range(4)]
    (samples / "conditions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([*argv, "--samples", str(samples)])
    assert "among 2 of 3 captions, 4 pictures" in capsys.readouterr().out
    monkeypatch.setattr("tarflow.pipeline.loading.device.best_device", lambda: "no such device")
    with pytest.raises(RuntimeError, match="no such device"):  # it measures on the best that there is
        main([*argv, "--samples", str(samples)])
    monkeypatch.setattr(training, "best_device", lambda: "no such device")
    with pytest.raises(RuntimeError, match="no such device"):
        train_captions(settings_with(config, output=str(tmp_path / "other")))


def streamed(path: str, **changes: Any) -> DataConfig:
    """The same pictures in four tar files, of which two cannot be used."""
    folder = Path(path)
    rows = []
    for about in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()):
        content = (folder / about.pop("file_name")).read_bytes()
        rows.append({"png": content, "json": json.dumps(about).encode()})
    rows[5]["png"], rows[9]["json"] = b"nothing", b"{"
    for shard in range(4):
        write(f"memory://captions/{shard}.tar", tar_bytes(rows[8 * shard : 8 * shard + 8], 8 * shard))
    given: dict[str, Any] = {"source": "webdataset", "path": "memory://captions/{0..3}.tar", "image_size": 16}
    given |= {"caption_template": "{text}, {style} style", "more_caption_templates": ["{keywords}, {style} style"]}
    return DataConfig(**{**given, "validation_fraction": 0.3, "on_error": "skip", **changes})


def test_a_stream_is_learned_as_a_folder(
    tmp_path: Path, vision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, vision, steps=5)
    config = settings_with(config, data=streamed(str(config.data.path)))
    train, held_out = open_pairs(config)
    assert len(train.indices) + train.left_out + len(held_out.indices) == 31  # one has no caption
    assert all(len(captions) == 2 for captions in [*train.captions, *held_out.captions])
    seen = {caption.casefold() for caption in held_out.first}
    assert train.left_out > 0 and seen.isdisjoint(caption.casefold() for caption in train.first)
    for pairs in (train, held_out):
        pictures = in_order(pairs.pictures())
        assert len(pictures) == len(pairs.captions)
        for picture, captions in zip(pictures, pairs.captions, strict=True):
            if picture is not None:  # of the shade that its caption says
                name, _, shade = captions[0].casefold().split(",")[0].split()
                expected = np.clip(np.array(COLOURS[name]) + 12 * int(shade), 0, 255)
                assert picture[:, 8, 8].tolist() == expected.tolist()
    unreadable = sum(picture is None for pairs in (train, held_out) for _, picture in pairs.pictures())
    score = train_captions(config)
    assert score.pictures + unreadable >= len(held_out.indices)
    told = "1 unreadable images of the split" in capsys.readouterr().out
    assert told == bool(unreadable)
    monkeypatch.setattr(training, "pooled_features", None)  # the features are there
    assert train_captions(config).first == pytest.approx(score.first, abs=1e-6)
    few = open_pairs(settings_with(config, num_images=6, num_validation_images=3))
    assert [len(few[0].indices) + few[0].left_out, len(few[1].indices)] == [6, 3]
    assert CaptionedRows(config.data, "train", 2, ["__folder__"]).values == [[("__folder__", "x")]] * 2
    for changes, message in (
        (
            {"concept": ["colour"]},
            "the stream has no column 'colour'; its rows have __folder__, __key__, emoji, keywords",
        ),
        ({"data": replace(config.data, on_error="raise")}, "of the shard 'memory://captions/1.tar'"),
        ({"data": replace(config.data, caption_template=None, more_caption_templates=[])}, "the data has no captions"),
        ({"data": replace(config.data, validation_fraction=0)}, "the split 'validation' of the data is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            open_pairs(settings_with(config, **changes))


def in_order(pictures: Iterator[tuple[int, torch.Tensor | None]]) -> list[torch.Tensor | None]:
    """Pictures by their numbers, each of which comes once."""
    found = list(pictures)
    assert sorted(number for number, _ in found) == list(range(len(found)))
    return [picture for _, picture in sorted(found, key=lambda pair: pair[0])]


@pytest.mark.parametrize("lanes", [1, 2])
def test_rows_that_are_gone_when_their_pictures_are_read(lanes: int) -> None:
    """The others keep their pictures, though they come in another order."""
    path = tar_shards("memory://gone", [2, 2, 2, 2])
    given: dict[str, Any] = {"source": "webdataset", "path": path, "image_size": 8, "caption_column": "txt"}
    given |= {"lanes": lanes, "validation_fraction": 0}
    rows, strict = (CaptionedRows(DataConfig(**given, on_error=way), "train") for way in ("skip", "raise"))
    expected = [int(caption.split()[1].strip(",")) for (caption,) in rows.captions]
    for gone, content in (({3}, tar_bytes([tar_row(2)], 2)), ({2, 3}, b"nothing")):
        write("memory://gone/001.tar", content)
        found = in_order(rows.pictures(range(8)))
        numbers = [None if picture is None else int(picture[0, 0, 0]) for picture in found]
        assert numbers == [None if number in gone else number for number in expected]
        message = "cannot be read any more|is cut off or damaged"
        with pytest.raises(ValueError, match=rf"the shard 'memory://gone/001.tar' .*({message})"):
            list(strict.pictures(range(8)))


def test_an_unreadable_picture_is_not_learned_from_anothers(tmp_path: Path, vision: str) -> None:
    config = settings(tmp_path, vision)
    train, _ = open_pairs(settings_with(config, data=replace(config.data, on_error="skip")))
    facts = train.images.facts(len(train.images)), train.indices  # type: ignore[union-attr]
    assert train.facts != facts  # by which earlier versions kept features, another's for one that cannot be read
    assert open_pairs(config)[0].facts == facts  # where none may be unreadable, these are kept
    broken = train.indices[3]
    (tmp_path / "data" / train.images.source.rows[broken].name).write_bytes(b"nothing")  # type: ignore[union-attr]
    assert [place for place, picture in train.pictures() if picture is None] == [3]
    assert train.only([place != 3 for place in range(len(train.indices))]).indices == [
        index for index in train.indices if index != broken
    ]


def settings_with(config: CaptionModelConfig, **changes: Any) -> CaptionModelConfig:
    return CaptionModelConfig(**{**vars(config), **changes})


def test_pictures_of_one_concept_are_no_wrong_answers() -> None:
    same = torch.eye(2)[[0, 0, 1]]  # the first two are of one concept, with equal captions
    concepts = torch.tensor([0, 0, 1])
    loss = contrastive_loss(same, same, torch.tensor(50.0), concepts)
    assert float(loss) == pytest.approx(2 / 3 * np.log(2), abs=1e-5)  # what cannot be told apart, and nothing else
    assert float(contrastive_loss(same, same, torch.tensor(50.0), torch.arange(3))) == pytest.approx(
        float(loss), abs=1e-5
    )
    wrong = contrastive_loss(same, same.flip(0), torch.tensor(50.0), concepts)
    assert float(wrong) > 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": "/nowhere"}, "there is no folder '/nowhere'"),
        ({"width": 30}, "width must be a multiple of heads, got 30 and 4"),
        ({"concept": ["colour"]}, "concept names the column 'colour', but the data has emoji, file_name"),
        ({"data": DataConfig(source="drawings")}, "drawings have no end"),
        ({"remove": "["}, "is no regular expression"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, vision: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        train_captions(settings(tmp_path, vision, **changes))


def test_pictures_without_captions_are_refused(tmp_path: Path, vision: str) -> None:
    data = DataConfig(source="folder", path=str(write_pictures(tmp_path / "plain", 9)), validation_fraction=0.3)
    with pytest.raises(ValueError, match="the data has no captions"):
        train_captions(settings(tmp_path, vision, data=data))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "m"], "give either samples"),
        (["--model", "m", "--samples", "nowhere"], "nowhere"),
        (["--model", "m", "--samples", "s", "--among", "1"], "among must be at least 2, got 1"),
    ],
)
def test_bad_arguments_are_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "captions", *argv])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_another_model_in_the_folder_is_not_replaced(tmp_path: Path, vision: str) -> None:
    before = files_of(Path(vision))
    with pytest.raises(ValueError, match="has another model, which would be replaced"):
        train_captions(settings(tmp_path, vision, output=vision))
    assert files_of(Path(vision)) == before


def test_damaged_features_are_made_anew(tmp_path: Path, vision: str) -> None:
    config = settings(tmp_path, vision, steps=2)
    score = train_captions(config)
    (Path(config.output) / "features.safetensors").write_bytes(b"")
    assert train_captions(config).first == pytest.approx(score.first, abs=1e-6)

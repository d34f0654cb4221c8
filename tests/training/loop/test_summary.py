"""What a run says of itself: before the first step, of the time, and at the end."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from helpers import ROOT
from PIL import Image
from trainings import CLASS_FLOW, TEXT_FLOW, train

from tarflow.cli import generate
from tarflow.cli.main import main
from tarflow.common.words import count_in_words, duration_in_words, rounded
from tarflow.data.config import DataConfig
from tarflow.data.images import Images
from tarflow.training.autoencoder.mixture import Mixture
from tarflow.training.autoencoder.task import AutoencoderTask
from tarflow.training.flow.report import own_captions, write_held_out
from tarflow.training.loop.component import example_line
from tarflow.training.loop.schedule import TIMED_STEPS
from tarflow.training.loop.summary import (
    TimeEstimate,
    beginning,
    drawing_line,
    held_out_in_words,
    number_of_pictures,
    pictures_in_words,
)


def captioned(folder: Path, count: int, captions: int) -> Path:
    """A folder of pictures with so many captions each."""
    folder.mkdir()
    lines = []
    for i in range(count):
        Image.new("L", (2, 2), i).save(folder / f"{i}.png")
        lines += [json.dumps({"file_name": f"{i}.png", "text": f"{i} by {j}"}) for j in range(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_numbers_are_said_in_words() -> None:
    counts = {999: "999", 12_345: "12,345", 7_900_000: "7.9 million", 3_900_000_000: "3.9 billion"}
    assert {count: count_in_words(count) for count in counts} == counts
    numbers = {0.0034: "0.0034", 0.352: "0.35", 9.96: "10", 158.2: "160", 1234.5: "1,200"}
    assert {value: rounded(value) for value in numbers} == numbers and rounded(1234.5, 3) == "1,230"
    times = {5: "1 minute", 150: "2 minutes", 3600: "1 hour", 49_990: "13 hours 50 minutes", 90_000: "1 day 1 hour"}
    times |= {172_800: "2 days", 7_260: "2 hours"}
    assert {seconds: duration_in_words(seconds) for seconds in times} == times


def test_a_run_says_what_it_trains_on(tmp_path: Path) -> None:
    config = DataConfig(source="folder", path=str(captioned(tmp_path / "a", 40, 3)), caption_column="text")
    config = DataConfig(**{**vars(config), "validation_fraction": 0.5})
    train, held_out = Images(config), Images(config, "validation")
    pictures, others = number_of_pictures(train), number_of_pictures(held_out)
    assert pictures + others == 40 and len(train) == 3 * pictures and others > 0
    told = pictures_in_words(train, held_out)
    assert told == f"{pictures} pictures, {others} others are held out"
    assert pictures_in_words(train, None) == f"{pictures} pictures, none is held out"
    first, second = beginning(told, len(train), 7_900_000, 90, len(train), tmp_path / "run")
    assert first == f"training on {told}; 7.9 million parameters learn"
    assert (
        second
        == f"90 steps of {len(train)} pictures, each is seen about 90 times; all is written to {tmp_path / 'run'}"
    )
    _, second = beginning(told, len(train), 10, 3, 2, tmp_path, first=1)
    assert second == f"3 steps of 2 pictures, most are seen once at most, from step 1 on; all is written to {tmp_path}"


def test_captions_made_of_columns_are_no_further_pictures(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "a", 6, 1)
    config = DataConfig(
        source="folder",
        path=str(folder),
        caption_template="{text}",
        more_caption_templates=["a {text}"],
        validation_fraction=0,
    )
    assert len(Images(config)) == 12 and number_of_pictures(Images(config)) == 6


def test_endless_drawings_are_no_number_of_pictures() -> None:
    drawings = Images(DataConfig(source="drawings", image_size=8))
    assert pictures_in_words(drawings, drawings) == "drawings, each made for its place in a batch"
    _, second = beginning("drawings", len(drawings), 5, 1000, 16, Path("runs/a"))
    assert second == "1,000 steps of 16 pictures; all is written to runs/a"
    _, second = beginning("40 pictures", 40, 5, 1000, 16, Path("runs/a"), minutes=0.5)
    assert second == "at most 1,000 steps of 16 pictures, and about 0.5 minutes; all is written to runs/a"
    assert held_out_in_words(1) == "1 other is held out"


def test_the_time_is_said_once_if_it_is_long() -> None:
    estimate = TimeEstimate("--train.max_minutes")
    said = [estimate.after(done, 100_000 - done, 5.0 + 0.5 * done) for done in range(1, 200)]
    (sentence,) = [one for one in said if one is not None]
    assert said.index(sentence) + 1 == TIMED_STEPS[1]
    assert sentence.startswith("about 13 hours 50 minutes to go, at 0.5 s a step") and "--train.max_minutes" in sentence
    short = TimeEstimate("--max_minutes")
    assert not any(short.after(done, 300 - done, 0.1 * done) for done in range(1, 300))


def test_grids_show_captions_of_the_data(tmp_path: Path) -> None:
    config = DataConfig(source="folder", path=str(captioned(tmp_path / "a", 40, 1)), caption_column="text")
    data = Images(config)
    shown = own_captions(data, 4)
    assert len(set(shown)) == 4 and shown == [data.caption(i * len(data) // 4) for i in range(4)]
    assert len(own_captions(data, 1000)) == len(data)
    drawings = Images(DataConfig(source="drawings", image_size=8), "validation")
    assert own_captions(drawings, 3) == [drawings.caption(i) for i in range(3)]
    for path in (ROOT / "configs").glob("*.yaml"):  # shipped captions are shipped data's
        assert "prompts" not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": ["a cat's face", "b"]}, ["a cat's face"]),
        ({"classes": ["blue ring"]}, ["--class", "blue ring"]),
        ({}, []),
    ],
)
def test_the_line_that_draws_is_a_command(arguments: dict, words: list[str]) -> None:
    line = drawing_line("my runs/pipeline", **arguments)
    assert shlex.split(line) == [
        "tarflow",
        "generate",
        *words,
        "--pipeline",
        "my runs/pipeline",
        "--out",
        "drawing.png",
    ]
    generate.check(generate.parser().parse_intermixed_args(shlex.split(line)[2:]))
    assert " --lora runs/a/lora --out" in drawing_line("emoji", options=("--lora", "runs/a/lora"), **arguments)


def test_further_components_say_how_to_draw_with_them(tmp_path: Path) -> None:
    drawings = Images(DataConfig(source="drawings", image_size=8))
    line = shlex.split(example_line(tmp_path, drawings, "prefix", "--decoding", "student"))
    assert line[2] == drawings.caption(0) and line[-4:-2] == ["--decoding", "student"]
    assert shlex.split(example_line(tmp_path, drawings, "class_prefix"))[2:4] == ["--class", drawings.class_names[0]]
    assert shlex.split(example_line(tmp_path, drawings, "none"))[2] == "--pipeline"
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    plain = Images(DataConfig(source="folder", path=str(tmp_path), validation_fraction=0))
    assert shlex.split(example_line(tmp_path, plain, "prefix"))[2] == "a caption"


def test_autoencoders_say_their_sources(tmp_path: Path) -> None:
    config = DataConfig(source="folder", path=str(captioned(tmp_path / "a", 6, 2)), validation_fraction=0)
    sources = [Images(config), Images(DataConfig(source="drawings", image_size=8))]
    task = SimpleNamespace(config=SimpleNamespace(sources=["emoji", "drawings"]), train=Mixture(sources, [1, 1], 0))
    assert AutoencoderTask.about(task) == "emoji (6 pictures) and drawings"


def test_means_of_held_out_pictures_go_with_the_pipeline(tmp_path: Path) -> None:
    write_held_out(tmp_path, {"latent_nats_per_dim": 0.5}, 271)
    assert json.loads((tmp_path / "held_out.json").read_text()) == {"images": 271, "latent_nats_per_dim": 0.5}
    write_held_out(tmp_path / "none", {}, 0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["classes", "captions", "adapter"])
def test_a_run_says_where_it_is_and_how_to_draw(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options, flow = [], CLASS_FLOW
    if kind != "classes":
        flow = TEXT_FLOW
        options = ["--text.kind", "small", "--text.width", "16", "--text.layers", "1"]
    folder = tmp_path / "run"
    train(folder, *options, "--train.steps", "2", "--log.log_every", "1", flow=flow)
    if kind == "adapter":
        folder, base = tmp_path / "adapter", str(folder / "pipeline")
        capsys.readouterr()
        train(folder, *options, "--init_from", base, "--lora.rank", "2", "--train.steps", "2", flow="{}")
    out = capsys.readouterr().out
    assert "training on drawings" in out and "parameters learn" in out
    assert f"2 steps of 8 pictures; all is written to {folder}" in out
    line = out.splitlines()[-1].strip()
    words = shlex.split(line)
    assert words[:2] == ["tarflow", "generate"]
    words[words.index("--out") + 1] = str(tmp_path / "drawing.png")
    main([*words[1:], "--device", "cpu"])
    assert (tmp_path / "drawing.png").is_file()
    if kind != "adapter":
        metrics = json.loads((folder / "pipeline" / "held_out.json").read_text())
        assert f"held-out latent_nats_per_dim {metrics['latent_nats_per_dim']:.4f}" in out and metrics["images"] == 8


def test_the_bar_shows_what_the_held_out_line_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr("tqdm.std.tqdm.set_postfix", lambda bar, values, **_: shown.append(dict(values)))
    logged = []
    trainer_log = Accelerator.log
    monkeypatch.setattr(
        Accelerator, "log", lambda self, values, step: logged.append(values) or trainer_log(self, values, step)
    )
    train(tmp_path, "--train.steps", "2", "--log.log_every", "1")
    assert len(shown) == 2 and all("loss" not in values for values in shown)
    steps = [values for values in logged if "train/nats_per_dim" in values]
    assert [float(values["nats_per_dim"]) for values in shown] == pytest.approx(
        [values["train/nats_per_dim"] for values in steps], abs=1e-4
    )
    for values in steps:  # the loss lacks the constant
        assert values["train/nats_per_dim"] - values["train/loss"] == pytest.approx(
            0.5 * math.log(2 * math.pi), abs=1e-4
        )

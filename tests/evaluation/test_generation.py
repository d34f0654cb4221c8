"""Many images from a pipeline: the same files whatever the processes and stops, and what they are drawn from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import CAPTIONS, make_pipeline

from tarflow import TARFlowPipeline
from tarflow.common.seeds import image_seed
from tarflow.data.config import DataConfig
from tarflow.data.drawings import all_captions
from tarflow.evaluation import conditions
from tarflow.evaluation.conditions import make_conditions, read_captions
from tarflow.evaluation.images import store as image_store
from tarflow.evaluation.samples.generation import generate_images
from tarflow.evaluation.samples.match import captioned_grid
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.pipeline.loading.examples import write_examples


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small pipelines by conditioning."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in ("class_prefix", "prefix"):
        make_pipeline(kind).save_pretrained(folder / kind)
    make_pipeline("none", vae=False).save_pretrained(folder / "none")
    return {path.name: str(path) for path in folder.iterdir()}


def config_of(pipeline: str, out: Path, **options: Any) -> GenerationConfig:
    return GenerationConfig(**{"pipeline": pipeline, "out": str(out), "num": 11, "batch_size": 4, **options})


def files(out: Path) -> dict[str, bytes]:
    """All images and conditions below a folder."""
    wanted = [path for path in out.rglob("*") if path.suffix in (".png", ".npz", ".npy", ".jsonl", ".tmp")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in wanted}


@pytest.fixture(scope="module")
def whole(pipelines: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run of one process writes."""
    out = tmp_path_factory.mktemp("whole")
    result = generate_images(config_of(pipelines["class_prefix"], out))
    assert result["complete"]
    assert (result["generated"], result["num"], result["images"]) == (11, 11, str(out))
    assert result["images_per_second"] > 0
    return files(out)


def test_names_and_images(whole: dict[str, bytes]) -> None:
    assert sorted(whole) == [*(f"00000/{i:08d}.png" for i in range(11)), "conditions.jsonl"]
    assert len({content for name, content in whole.items() if name.endswith(".png")}) == 11


def test_processes_and_stops_change_nothing(pipelines, whole, tmp_path, monkeypatch) -> None:
    config = config_of(pipelines["class_prefix"], tmp_path)
    assert not generate_images(config, process=1, processes=3)["complete"]
    assert generate_images(config, process=0, processes=2)["complete"]  # chunks 0 and 2; 1 is there
    assert files(tmp_path) == whole

    for name in ("00000005.png", "00000006.png"):
        (tmp_path / "00000" / name).unlink()
    (tmp_path / "00000" / "00000009.png").write_bytes(b"")  # as after a power cut
    write_one = image_store.PngStore._write_one

    def dying(store: Any, index: int, image: np.ndarray) -> None:
        if index == 6:
            raise KeyboardInterrupt
        write_one(store, index, image)

    monkeypatch.setattr(image_store.PngStore, "_write_one", dying)
    with pytest.raises(KeyboardInterrupt):
        generate_images(config)
    monkeypatch.undo()
    assert not json.loads((tmp_path / "generation.json").read_text())["complete"]
    result = generate_images(config)
    assert result["complete"]
    assert result["generated"] == 7  # the two chunks that were not whole
    assert files(tmp_path) == whole
    again = generate_images(config)
    assert again["generated"] == 0
    assert again["images_per_second"] == pytest.approx(result["images_per_second"])


def test_more_images_of_the_same_settings(pipelines, whole, tmp_path) -> None:
    generate_images(config_of(pipelines["class_prefix"], tmp_path, num=6))
    assert generate_images(config_of(pipelines["class_prefix"], tmp_path))["generated"] == 7
    assert files(tmp_path) == whole


def test_another_batch_size_changes_a_grey_level_at_most(pipelines, whole, tmp_path) -> None:
    generate_images(config_of(pipelines["class_prefix"], tmp_path, batch_size=7))
    for name, content in files(tmp_path).items():
        if name.endswith(".png"):
            (tmp_path / "whole.png").write_bytes(whole[name])
            one, other = (np.asarray(Image.open(path), int) for path in (tmp_path / name, tmp_path / "whole.png"))
            assert np.abs(one - other).max() <= 1, name
        else:
            assert content == whole[name]


def test_npz_has_the_layout_of_adm(pipelines, whole, tmp_path, monkeypatch) -> None:
    config = config_of(pipelines["class_prefix"], tmp_path, format="npz")
    generate_images(config, process=1, processes=2)
    assert list(files(tmp_path)) == ["parts/00000004.npy"]
    assert generate_images(config)["images"] == str(tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        assert list(arrays) == ["arr_0", "arr_1"]
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (11, 32, 32, 3), np.int64)
    assert labels.tolist() == [i % 3 for i in range(11)]
    (tmp_path / "image.png").write_bytes(whole["00000/00000010.png"])
    assert np.array_equal(images[10], np.asarray(Image.open(tmp_path / "image.png")))
    assert {path.name for path in tmp_path.iterdir()} >= {"samples.npz", "generation.json", "conditions.jsonl"}
    assert not (tmp_path / "parts").exists()
    assert generate_images(config)["generated"] == 0


def test_other_files_beside_parts_stay(tmp_path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.txt").write_text("mine")
    generate_images(config_of("given", tmp_path, format="npz"), pipe=make_pipeline())
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["mine.txt"]


def test_grey_images_become_rgb_and_arr_1_is_for_classes_only(tmp_path) -> None:
    pipe = make_pipeline("none", vae=False)
    generate_images(config_of("given", tmp_path, format="npz", num=2), pipe=pipe)
    with np.load(tmp_path / "samples.npz") as arrays:
        assert list(arrays) == ["arr_0"]
        assert arrays["arr_0"].shape == (2, 4, 4, 3)


def test_captions_come_again(pipelines, tmp_path) -> None:
    (tmp_path / "captions.txt").write_text(f"{CAPTIONS[0]}\n\n  {CAPTIONS[1]} \n")
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CAPTIONS))
    outs = []
    for name in ("captions.txt", "captions.jsonl"):
        outs.append(tmp_path / name.replace(".", "-"))
        options = {"captions": str(tmp_path / name), "num": 3, "guidance_scale": 2.0}
        generate_images(config_of(pipelines["prefix"], outs[-1], **options))
    assert files(outs[0]) == files(outs[1])
    rows = [json.loads(line) for line in (outs[0] / "conditions.jsonl").read_text().splitlines()]
    assert rows == [{"index": i, "caption": CAPTIONS[i % 2]} for i in range(3)]
    assert read_captions(str(outs[0] / "conditions.jsonl")) == [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]]


def test_captions_of_drawings_and_of_data() -> None:
    pipe = make_pipeline("prefix")
    assert make_conditions(pipe, captions="drawings").values(range(109)) == [*all_captions(), all_captions()[0]]
    data = DataConfig(image_size=32)
    found = make_conditions(pipe, captions="data", data=data, split="validation").arguments(range(2))
    assert [text.split()[-1] for text in found["prompt"]] == ["background"] * 2


def test_labels(tmp_path, monkeypatch) -> None:
    pipe = make_pipeline()
    indices = range(3000)
    assert Counter(make_conditions(pipe).values(indices)) == {0: 1000, 1: 1000, 2: 1000}
    assert set(make_conditions(pipe, labels="gas pump").values(indices)) == {2}
    drawn = make_conditions(pipe, 5, "data", [1, 0, 3])
    counts = Counter(drawn.values(indices))
    assert set(counts) == {0, 2}
    assert counts[2] == pytest.approx(2250, abs=100)
    assert drawn.values(range(7, 9)) == drawn.values(indices)[7:9]
    assert make_conditions(pipe, 6, "data", [1, 0, 3]).values(indices) != drawn.values(indices)

    for name, count in (("a", 1), ("b", 2), ("c", 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    data = DataConfig(source="folder", path=str(tmp_path), validation_fraction=0)
    assert make_conditions(pipe, labels="data", data=data).summary["counts"] == [1, 2, 5]
    monkeypatch.setattr(conditions, "COUNTED_DRAWINGS", 1000)
    with pytest.raises(ValueError, match="the model has 3 classes, and the data 36, of which"):
        make_conditions(pipe, labels="data", data=DataConfig())


def test_sigma_and_seed(tmp_path) -> None:
    pipe = make_pipeline("none", vae=False)
    outs = {}
    for name, options in {
        "own": {},
        "same": {"noise_std": 0.3},
        "less": {"noise_std": 0.1},
        "zero": {"noise_std": 0.0},
        "raw": {"denoise": False},
        "seed": {"seed": 1},
    }.items():
        generate_images(config_of("given", tmp_path / name, num=2, **options), pipe=pipe)
        outs[name] = files(tmp_path / name)
    assert pipe.config.noise_std == 0.3
    assert outs["own"] == outs["same"]
    assert outs["zero"] == outs["raw"]
    assert len({content["00000/00000000.png"] for content in outs.values()}) == 4
    assert image_seed(1, 0) - image_seed(0, 0) > 10**6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 there and is 1 here"),
        ({"batch_size": 5}, "batch_size was 4 there and is 5 here"),
        ({"guidance_scale": 2.0}, r"guidance_scale was 1\.0 there and is 2\.0 here"),
        ({"labels": 1}, "conditions was"),
        ({"format": "npz"}, "format was 'png' there"),
        ({"num": 10}, "num was 11 there and is 10 here"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, change, message) -> None:
    pipe = make_pipeline()
    generate_images(config_of("given", tmp_path), pipe=pipe)
    with pytest.raises(ValueError, match=f"holds images of other settings: {message}"):
        generate_images(config_of("given", tmp_path, **change), pipe=pipe)


def test_another_pipeline_and_an_unreadable_record_are_refused(tmp_path) -> None:
    generate_images(config_of("given", tmp_path), pipe=make_pipeline())
    with pytest.raises(ValueError, match="they are of another pipeline"):
        generate_images(config_of("given", tmp_path), pipe=make_pipeline())
    (tmp_path / "generation.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation\.json' cannot be read"):
        generate_images(config_of("given", tmp_path), pipe=make_pipeline())
    (tmp_path / "generation.json").write_text('{"model": "other"}')
    with pytest.raises(ValueError, match=r"generation\.json in .* is no record of generated images"):
        generate_images(config_of("given", tmp_path), pipe=make_pipeline())


def test_pictures_of_other_origin_are_refused(tmp_path) -> None:
    """They would be taken for images that are drawn already."""
    (tmp_path / "00000").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "00000/00000000.png")
    with pytest.raises(ValueError, match=r"holds pictures such as 00000000\.png, but no generation\.json"):
        generate_images(config_of("given", tmp_path), pipe=make_pipeline())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be from 0 to 4,294,967,295, got -1"),
        ({"guidance_scale": 0.5}, r"guidance_scale must be at least 1 \(off\)"),
        ({"noise_std": -0.1}, r"noise_std must be 0 or positive, got -0\.1"),
        ({"format": "jpg"}, "format must be 'png' or 'npz'"),
    ],
)
def test_numbers_out_of_range(tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        config_of("x", tmp_path, **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("none", {"labels": "balanced"}, "conditioning 'none' and takes no labels"),
        ("none", {"captions": "drawings"}, "takes no captions"),
        ("none", {"denoise": "learned"}, "no learned denoiser"),
        ("prefix", {}, "has no examples.json: give --captions FILE"),
        ("prefix", {"captions": "absent.txt"}, "cannot read the captions file 'absent.txt'"),
        ("prefix", {"captions": "data"}, "no data is given"),
        ("class_prefix", {"labels": 3}, "class labels must be 0 to 2, got 3"),
        ("class_prefix", {"labels": "data"}, "give label_counts or data"),
        ("class_prefix", {"labels": "data", "label_counts": [1.0, 2.0]}, "label_counts must be 3 numbers"),
        ("class_prefix", {"label_counts": [1.0, 2.0, 3.0]}, "only with labels 'data'"),
    ],
)
def test_conditions_that_do_not_fit(tmp_path, kind, options, message) -> None:
    pipe = make_pipeline(kind, vae=kind != "none")
    with pytest.raises(ValueError, match=message):
        generate_images(config_of("given", tmp_path / "out", **options), pipe=pipe)
    assert not (tmp_path / "out").exists()


def test_bad_caption_files(tmp_path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"image": 1}\n')
    with pytest.raises(ValueError, match=r"empty\.txt' is empty"):
        read_captions(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match=r"line 2 of .*bad\.jsonl' is no JSON object with a text"):
        read_captions(str(tmp_path / "bad.jsonl"))


def test_captions_are_the_pipelines_own_examples_unless_told(tmp_path) -> None:
    make_pipeline("prefix").save_pretrained(tmp_path / "pipeline")
    write_examples(tmp_path / "pipeline", ["a red ring", "a blue star", "a red ring"])
    write_examples(tmp_path / "pipeline", ["another"])  # what is there stays
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    conditions = make_conditions(pipe)
    assert conditions.values(range(3)) == ["a red ring", "a blue star", "a red ring"]
    assert conditions.summary["count"] == 2 and conditions.fixed
    of_data = make_conditions(pipe, data=DataConfig(image_size=16))
    assert of_data.summary == make_conditions(pipe, captions="data", data=DataConfig(image_size=16)).summary
    assert not set(of_data.values(range(3))) & {"a blue star"}


def test_captions_below_pictures_have_plain_spaces_and_no_boxes() -> None:
    odd = "a\u202fred\u2009\u200bca\u00adt\tand\na\ufeff\u200e dog\x00"
    here, there = (captioned_grid([Image.new("RGB", (99, 9))], [text]) for text in (odd, "a red cat and a dog"))
    assert np.array_equal(np.asarray(here), np.asarray(there))

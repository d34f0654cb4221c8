"""The pipelines that ship with the project: small, documented, loaded by name, and drawing what is asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import ROOT

from tarflow import TARFlowPipeline
from tarflow.data.drawing_checker import class_shares, match_shares
from tarflow.data.drawings import CLASS_NAMES, all_captions
from tarflow.evaluation.samples.match import generate
from tarflow.models import FOLDER, SHARED, followed, resolve, shipped
from tarflow.pipeline.loading.folder import add_component
from tarflow.vae.codec import load_autoencoder
from tarflow.vae.decoder import LatentDecoder

#: Each card has these sections.
SECTIONS = ("Use", "Data", "Recipe", "Measured", "Limits", "Licence")


@pytest.fixture(scope="module")
def pipelines() -> dict[str, TARFlowPipeline]:
    loaded = {name: TARFlowPipeline.from_pretrained(name) for name in shipped()}
    for pipe in loaded.values():
        pipe.set_progress_bar_config(disable=True)
    return loaded


def test_there_are_three_and_they_are_small() -> None:
    assert shipped() == ("drawings_class", "drawings_text", "emoji")
    weights = [*FOLDER.rglob("*.safetensors"), *(ROOT / "vae").rglob("*.safetensors")]
    assert sum(path.stat().st_size for path in weights) <= 45 * 2**20
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.name != "decoding.json") < 45 * 2**20
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    assert len(set(digests)) == len(digests)  # each is there once
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        assert not list(FOLDER.rglob(pattern))


def test_names_folders_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("emoji") == str(FOLDER / "emoji")
    assert resolve("someone/emoji") == "someone/emoji"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    assert resolve("emoji") == str(FOLDER / "emoji")  # of pictures that were drawn, say
    (tmp_path / "emoji" / "model_index.json").touch()
    assert resolve("emoji") == "emoji"  # a pipeline here comes first
    (tmp_path / "drawings_text" / "pipeline").mkdir(parents=True)
    (tmp_path / "drawings_text" / "pipeline" / "model_index.json").touch()
    assert resolve("drawings_text") == "drawings_text"  # and a run, which is told from its pipeline


@pytest.mark.parametrize("where", ["name", "folder"])
def test_a_shared_autoencoder_is_an_ordinary_one(tmp_path: Path, where: str) -> None:
    source = "drawings_class" if where == "name" else str(FOLDER / "drawings_class")
    pipe = TARFlowPipeline.from_pretrained(source, torch_dtype=torch.float16)
    other = AutoencoderKL.from_pretrained(FOLDER / "drawings_text" / "vae", torch_dtype=torch.float16)
    assert type(pipe.vae) is AutoencoderKL and pipe.vae.dtype == torch.float16
    for key, value in other.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[key], value)
    pipe.save_pretrained(tmp_path / "saved")
    add_component(
        FOLDER / "drawings_class", tmp_path / "more", "finetuned_decoder", LatentDecoder.from_autoencoder(other)
    )
    for copy in ("saved", "more"):  # which hold all that they need
        index = json.loads((tmp_path / copy / "model_index.json").read_text())
        assert index["vae"] == ["diffusers", "AutoencoderKL"]
        assert (tmp_path / copy / "vae" / "diffusion_pytorch_model.safetensors").is_file()
        assert not list((tmp_path / copy).rglob(SHARED))
        assert type(TARFlowPipeline.from_pretrained(tmp_path / copy).vae) is AutoencoderKL
    for name, subfolder in ((source, "vae"), (str(FOLDER / "drawings_class" / "vae"), None)):
        if where == "folder":
            assert type(load_autoencoder(name, subfolder)) is AutoencoderKL


def test_an_autoencoder_that_is_not_shipped_is_named(tmp_path: Path) -> None:
    (tmp_path / SHARED).write_text('{"autoencoder": "f16"}')
    with pytest.raises(ValueError, match="'f16'; shipped are drawings_emoji_f8c8, taef2: install the version"):
        followed(tmp_path)


@pytest.mark.parametrize("name", shipped())
def test_has_a_card(name: str) -> None:
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert [section for section in SECTIONS if f"\n## {section}\n" not in card] == []


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        ("emoji", {"prompt": ["red heart, noto style", "grinning face, twemoji style"]}),
        ("drawings_text", {"prompt": ["a small blue ring on a light background", "a large red star"]}),
        ("drawings_class", {"class_labels": ["blue ring", "red star"]}),
    ],
)
def test_inverts_itself_and_depends_on_the_condition(pipelines, name: str, condition: dict) -> None:
    pipe = pipelines[name]
    channels = pipe.flow.config.in_channels
    noise = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    output = pipe(**condition, latents=noise, decoding="sequential", return_residual=True, output_type="np")
    assert output.residual_max.max() < 1e-3
    first, second = output.images
    assert first.std() > 0.05
    assert np.abs(first - second).mean() > 0.02


def test_draws_the_drawings_that_are_asked_for(pipelines) -> None:
    captions = all_captions()[::4]
    shares = match_shares(generate(pipelines["drawings_text"], {"prompt": captions}, 27), captions)
    assert shares["colour"] > 0.9
    assert shares["all"] > 0.7


def test_students_draw_the_drawings_that_are_asked_for(pipelines) -> None:
    captions, names = all_captions()[::2], list(CLASS_NAMES)
    pictures = generate(pipelines["drawings_text"], {"prompt": captions}, 54, decoding="student")
    assert match_shares(pictures, captions)["all"] > 0.9
    pictures = generate(pipelines["drawings_class"], {"class_labels": names}, 36, decoding="student")
    assert class_shares(pictures, names)["all"] > 0.8


def test_draws_emoji_of_the_colour_that_is_asked_for(pipelines) -> None:
    prompts = [f"{colour} heart, noto style" for colour in ("red", "blue")] * 4
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    images = pipelines["emoji"](prompts, generator=generators, decoding="sequential", output_type="np").images
    # Redness against blueness, away from the white background, of each picture.
    colours = [image[image.max(-1) - image.min(-1) > 0.1].mean(0) for image in images]
    redness = [colour[0] - colour[2] for colour in colours]
    assert min(redness[::2]) > 0.1
    assert np.mean(redness[1::2]) < -0.05

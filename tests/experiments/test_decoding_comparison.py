"""Ways of removing the noise side by side: the same samples, a table and pictures."""

from __future__ import annotations

import json

import pytest
from autoencoders import small_autoencoder
from decoders import with_decoder
from fid_helpers import Means
from helpers import small_model
from PIL import Image

from tarflow import TARFlowPipeline
from tarflow.cli.compare_decoding import main as command
from tarflow.data.config import DataConfig
from tarflow.evaluation.features import extractors
from tarflow.evaluation.features.extractors import Extractor
from tarflow.experiments.decoding import compare_decoding
from tarflow.experiments.settings import ComparisonConfig


@pytest.fixture
def folder(tmp_path):
    """A pipeline with all methods that draws 36 classes in 16 × 16 pixels."""
    vae = small_autoencoder(scaling_factor=1.0, shift_factor=None)
    classes = {"conditioning": "class_prefix", "num_classes": 36}
    flow = small_model(in_channels=8, sample_size=8, learned_denoiser="conditional", denoiser_layers=1, **classes)
    pipe = TARFlowPipeline(flow, vae, latents_mean=[0.0] * 8, latents_std=[1.0] * 8, noise_std=0.5)
    with_decoder(pipe).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_table_and_pictures(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(extractors, "load_extractor", lambda *_: Extractor("means", Means(), "none", "none"))
    drawn, call = [], TARFlowPipeline.__call__

    def counting(pipe, *arguments, **options):
        drawn.append(len(options["generator"]))
        return call(pipe, *arguments, **options)

    monkeypatch.setattr(TARFlowPipeline, "__call__", counting)
    options = ["--num", "6", "--batch_size", "4", "--pictures", "5", "--columns", "3", "--repeats", "1"]
    out = tmp_path / "out"
    command(
        [
            "--pipeline",
            str(folder),
            "--out",
            str(out),
            "--data.source",
            "drawings",
            "--data.image_size",
            "16",
            "--extractor",
            "means",
            *options,
        ]
    )
    assert drawn == [4, 2]  # each sample once
    report = json.loads((out / "comparison.json").read_text())
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == ["none", "score", "learned", "finetuned"]
    for row in rows.values():
        assert row["total_seconds"] > row["seconds"] > 0
        assert row["distance"] > 0
        assert row["psnr"] > 5
    assert len({row["psnr"] for row in rows.values()}) == 4
    assert len((out / "comparison.md").read_text().splitlines()) == 9
    assert "Fréchet distance (means)" in capsys.readouterr().out
    assert Image.open(out / "samples.png").size == (80 + 3 * 100, 4 * 100)
    assert Image.open(out / "reconstructions.png").size == (80 + 3 * 100, 5 * 100)


def test_without_the_parts_there_are_fewer_methods(folder, tmp_path) -> None:
    pipe = TARFlowPipeline.from_pretrained(folder, finetuned_decoder=None)
    pipe.set_progress_bar_config(disable=True)
    data = {"data": DataConfig(image_size=16), "pipeline": "x", "extractor": None}
    config = ComparisonConfig(**data, out=str(tmp_path / "out"), num=2, pictures=2, repeats=1)
    rows = compare_decoding(config, pipe)
    assert [row["method"] for row in rows] == ["none", "score", "learned"]
    assert [row["distance"] for row in rows] == [None] * 3
    assert "Fréchet" not in (tmp_path / "out" / "comparison.md").read_text()
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        ComparisonConfig(**data, out="x", repeats=0)
    with pytest.raises(ValueError, match="ref are for a distance, but extractor is null"):
        ComparisonConfig(**data, out="x", ref="stats")


def test_models_of_pixels_are_refused(tmp_path) -> None:
    pipe = TARFlowPipeline(small_model(in_channels=3, conditioning="none", num_classes=0, cond_dim=0))
    config = ComparisonConfig(pipeline="x", data=DataConfig(image_size=4), out=str(tmp_path), extractor=None)
    with pytest.raises(ValueError, match="draws pixels: it has no decoder that could remove the noise"):
        compare_decoding(config, pipe)

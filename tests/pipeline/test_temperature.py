"""The temperature of a pipeline's draws: its own, that of a call, and where none is applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import make_pipeline

from tarflow import TARFlowPipeline
from tarflow.cli import generate as command
from tarflow.evaluation.reports.settings import SweepConfig
from tarflow.evaluation.reports.sweep import run_sweep
from tarflow.evaluation.reports.sweep_tables import row_name
from tarflow.evaluation.samples.generation import generate_images
from tarflow.evaluation.samples.match import generate
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.experiments.peers.drawing import FlowDrawer


def seeded(pipe: TARFlowPipeline, **options: Any) -> np.ndarray:
    """Two pictures of the same two seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe(
        class_labels=[0, 1], generator=generators, denoise=False, decoding="sequential", output_type="np", **options
    ).images


@pytest.fixture(scope="module")
def cool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of temperature 0.5."""
    pipe = make_pipeline("class_prefix")
    pipe.register_to_config(temperature=0.5)
    folder = tmp_path_factory.mktemp("cool") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


def test_a_pipelines_own_is_saved_and_taken_for_noise_that_it_draws(cool: Path) -> None:
    pipe = TARFlowPipeline.from_pretrained(cool)
    assert pipe.config.temperature == 0.5
    own, plain = seeded(pipe), seeded(pipe, temperature=1.0)
    np.testing.assert_allclose(own, seeded(pipe, temperature=0.5), atol=1e-5)
    assert np.abs(own - plain).max() > 1e-3


def test_given_latents_are_taken_as_they_are_unless_a_call_says_otherwise(cool: Path) -> None:
    pipe, plain = TARFlowPipeline.from_pretrained(cool), TARFlowPipeline.from_pretrained(cool, temperature=1.0)
    noise = torch.randn(2, 8, 4, 4)
    here = seeded(pipe, latents=noise)
    np.testing.assert_allclose(here, seeded(plain, latents=noise), atol=1e-5)
    np.testing.assert_allclose(
        seeded(pipe, latents=noise, temperature=0.5), seeded(pipe, latents=0.5 * noise), atol=1e-5
    )
    assert np.abs(seeded(pipe, latents=noise, temperature=0.5) - here).max() > 1e-3


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), True, "warm"])
def test_what_is_no_positive_number(temperature: Any) -> None:
    pipe = make_pipeline("none")
    expected = "positive" if type(temperature) in (int, float) else "a number"
    with pytest.raises(ValueError, match=f"temperature must be {expected}, got"):
        pipe(num_images=1, temperature=temperature)
    with pytest.raises(ValueError, match=f"temperature must be {expected}, got"):
        TARFlowPipeline(pipe.flow, pipe.vae, temperature=temperature)
    pipe.register_to_config(temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        pipe(num_images=1)


def test_numbers_of_numpy_are_numbers() -> None:
    pipe = make_pipeline("none")
    assert pipe(num_images=1, temperature=np.float32(0.5), output_type="np").images.shape[0] == 1
    json.dumps(TARFlowPipeline(pipe.flow, pipe.vae, temperature=np.float32(0.5)).config.temperature)


def test_the_command_draws_at_it(cool: Path, tmp_path: Path) -> None:
    def drawn(name: str, *options: str) -> bytes:
        command.main(["--pipeline", str(cool), "--class", "0", "--seed", "3", "--out", str(tmp_path / name), *options])
        return (tmp_path / name).read_bytes()

    assert drawn("own.png") != drawn("plain.png", "--temperature", "1")
    with pytest.raises(ValueError, match="--temperature must be positive, got 0"):
        drawn("none.png", "--temperature", "0")


def test_samples_tell_it_and_other_defaults_are_no_other_pipeline(cool: Path, tmp_path: Path) -> None:
    def record(name: str, pipeline: Path, **options: Any) -> dict[str, Any]:
        generate_images(GenerationConfig(pipeline=str(pipeline), out=str(tmp_path / name), num=1, **options))
        return json.loads((tmp_path / name / "generation.json").read_text())["settings"]

    TARFlowPipeline.from_pretrained(cool, temperature=1.0).save_pretrained(tmp_path / "plain")
    own, plain = record("a", cool), record("b", tmp_path / "plain")
    assert own == {**plain, "temperature": 0.5} == record("c", tmp_path / "plain", temperature=0.5)
    assert "temperature" not in plain
    for name, pipeline, told in (
        ("a", tmp_path / "plain", "0.5 there and is 1.0"),
        ("b", cool, "1.0 there and is 0.5"),
    ):
        with pytest.raises(ValueError, match=f"holds images of other settings: temperature was {told} here"):
            generate_images(GenerationConfig(pipeline=str(pipeline), out=str(tmp_path / name), num=2))


def test_peers_have_all_of_the_noise_as_a_dit_has(cool: Path) -> None:
    drawer = FlowDrawer(cool, "class", 1.0)
    plain = generate(drawer.pipe, {"class_labels": [0, 1]}, 2, 0, temperature=1.0)
    for here, there in zip(drawer.draw([0, 1], 0), plain, strict=True):
        np.testing.assert_allclose(np.asarray(here, int), np.asarray(there, int), atol=1)


def test_sweeps_have_rows_of_each(cool: Path, tmp_path: Path) -> None:
    gen = GenerationConfig(pipeline=str(cool), out=str(tmp_path), num=1, decoding="sequential", denoise=False)
    rows = run_sweep(SweepConfig(gen=gen, temperature=[0.5, 1.0], match=True), lambda folder: {"fid": 1.0})
    names = ["guidance-1_raw_sequential_temperature-0.5", "guidance-1_raw_sequential"]
    assert [row_name(row["settings"]) for row in rows] == names
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(names)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        SweepConfig(gen=gen, temperature=[0.0], match=True)

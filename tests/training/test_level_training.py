"""Training one flow for many noise levels: whose level is which, what counts how much, what goes on, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from draws import CPU, assert_independent, parts, pictures, run_config
from students import small_student
from trainings import CLASS_FLOW, PIXEL_FLOW, train, weights

from tarflow import TARFlowPipeline
from tarflow.data.config import DataConfig
from tarflow.data.images import Images
from tarflow.evaluation.likelihood.held_out import evaluate_likelihood
from tarflow.evaluation.reports.settings import SweepConfig
from tarflow.evaluation.reports.sweep import run_sweep
from tarflow.evaluation.samples.generation import generate_images
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.experiments.noise_levels import compare_noise_levels
from tarflow.experiments.noise_levels import train as run_training
from tarflow.experiments.settings import LevelComparisonConfig
from tarflow.flows.likelihood import flow_loss
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.inputs import InputMaker
from tarflow.training.flow.levels import levels_from, loss_weights
from tarflow.training.flow.levels_config import NoiseLevels
from tarflow.training.flow.objective import FlowObjective

LEVELS = ["--train.noise_levels.low", "0.02", "--train.noise_levels.high", "0.5"]
PIXELS = ["--vae.name", "none", "--data.image_size", "16", *LEVELS]


def test_levels_have_their_distribution() -> None:
    chances = (torch.arange(20_000) + 0.5) / 20_000
    uniform = levels_from(chances, NoiseLevels(low=0.1, high=0.5))
    assert uniform.min() >= 0.1 and uniform.max() <= 0.5
    assert float(uniform.mean()) == pytest.approx(0.3, abs=1e-4)
    assert float(uniform.std()) == pytest.approx(0.4 / math.sqrt(12), abs=1e-4)
    wide = levels_from(chances, NoiseLevels(low=1e-6, high=1e4, distribution="log_normal")).log()
    assert float(wide.mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(wide.std()) == pytest.approx(1, abs=1e-2)
    narrow = levels_from(chances, NoiseLevels(low=0.2, high=0.3, distribution="log_normal"))
    assert narrow.min() >= 0.2 and narrow.max() <= 0.3
    assert (narrow.diff() >= 0).all() and narrow.diff().max() < 2e-5  # cut off, and nothing piled up at the ends
    for far in (NoiseLevels(low=1e3, high=2e3, distribution="log_normal"), NoiseLevels(low=1e-9, high=1e-8)):
        found = levels_from(chances, far)
        assert found.isfinite().all() and found.min() >= far.low * 0.999 and found.max() <= far.high * 1.001
    own = torch.tensor([0.1, 0.5])
    for weight, expected in (("level", [0.1, 0.5]), ("square", [0.01, 0.25]), ("one", [1, 1])):
        assert loss_weights(own, weight).tolist() == pytest.approx(expected)


def test_a_pictures_level_is_a_stream_of_its_own() -> None:
    config = run_config(
        "--data.flip", "true", "--vae.name", "none", "--train.noise_levels.low", "1", "--train.noise_levels.high", "2"
    )
    count = 4_000
    batch = {"image": pictures()[:count], "label": torch.zeros(count).long()}
    maker = InputMaker(config, parts(), CPU)
    inputs = maker.training(batch, 5, range(count))
    level, dropped = inputs["noise_level"], inputs["class_labels"] == 3
    assert torch.equal(inputs["loss_weights"], level)
    flipped = maker.training(batch, 5, range(count))["latents"]
    assert torch.equal(flipped, inputs["latents"])  # the same for the same step
    assert not torch.equal(maker.training(batch, 6, range(count))["noise_level"], level)
    some = {name: value[7:9] for name, value in batch.items()}
    torch.testing.assert_close(maker.training(some, 5, [7, 8])["noise_level"], level[7:9])
    clean = run_config("--data.flip", "true", "--vae.name", "none", "--train.noise_std", "0")
    noise = inputs["latents"] - InputMaker(clean, parts(), CPU).training(batch, 5, range(count))["latents"]
    noise = noise / level[:, None, None, None]
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert_independent(noise=noise, level=level, dropped=dropped)
    told = maker.evaluation(batch, range(count), 1.5)
    assert told["noise_level"].unique().tolist() == [1.5]
    assert maker.evaluation(batch, range(count))["noise_level"].unique().tolist() == [2.0]


def test_the_objective_weighs_pictures_by_their_levels() -> None:
    trainer_flow = parse_config(["--data", "{}", "--flow", CLASS_FLOW, "--output", "x", *LEVELS])[0]
    assert trainer_flow.train.noise_levels == NoiseLevels(low=0.02, high=0.5)
    from helpers import small_model

    flow = small_model(noise_conditioning=True)
    x, levels = torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.2, 0.5])
    output = FlowObjective(flow)(x, noise_level=levels, loss_weights=levels)
    z, log_det = flow(x, noise_level=levels)
    torch.testing.assert_close(output["loss"], flow_loss(z, log_det, levels))


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_a_run_trains_reports_resumes_and_draws(tmp_path: Path, kind: str) -> None:
    options = [*(LEVELS if kind == "latents" else PIXELS), "--train.steps", "4", "--log.num_inference_steps", "3"]
    flow = CLASS_FLOW if kind == "latents" else PIXEL_FLOW
    shown = ["--log.sample_every", "4", "--log.sample_images", "4", "--log.checkpoint_every", "2"]
    _, metrics = train(tmp_path / "whole", *options, *shown, flow=flow)
    name = "latent_nats_per_dim" if kind == "latents" else "pixel_nats_per_dim"
    assert {key for key in metrics if "nats" in key} == {f"{name}_at_{level}" for level in ("0.02", "0.1", "0.5")}
    assert (tmp_path / "whole" / "samples" / "samples_00000004.png").is_file()
    resume = ["--resume", str(tmp_path / "whole" / "checkpoints" / "step_00000002")]
    train(tmp_path / "again", *options, *resume, flow=flow)
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    with pytest.raises(ValueError, match=r"train\.noise_levels\.high is 0\.5 there and 0\.6 here"):
        train(tmp_path / "other", *options, "--train.noise_levels.high", "0.6", *resume, flow=flow)

    pipe = TARFlowPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.noise_levels, pipe.config.num_inference_steps, pipe.config.noise_std) == ((0.02, 0.5), 3, 0.5)
    assert pipe(class_labels=["red circle"]).images[0].size == ((32, 32) if kind == "latents" else (16, 16))
    assert pipe.num_timesteps == 5
    data = Images(DataConfig(source="drawings", image_size=32 if kind == "latents" else 16), "validation")
    found = [evaluate_likelihood(pipe, data, 4, draws=2, noise_level=level) for level in (0.02, 0.5)]
    assert [one.noise_level for one in found] == [0.02, 0.5]
    assert {one.name for one in found} == {name}
    with pytest.raises(ValueError, match="in the trained levels"):
        evaluate_likelihood(pipe, data, 4, noise_level=0.7)
    more = ["--init_from", str(tmp_path / "whole" / "pipeline")]
    own = LEVELS if kind == "latents" else PIXELS
    adapter, _ = train(tmp_path / "lora", *own, *more, "--lora.rank", "2", "--train.steps", "1", flow="{}")
    assert adapter.step == 1
    with pytest.raises(ValueError, match=r"noise_levels are 0\.02 to 0\.6, but the pipeline .* has 0\.02 to 0\.5"):
        train(tmp_path / "x", *own, "--train.noise_levels.high", "0.6", *more, "--lora.rank", "2", flow="{}")
    with pytest.raises(ValueError, match=r"give train\.noise_levels, with low"):
        train(tmp_path / "y", *(own[:-4]), *more, flow="{}")


def test_students_sweeps_and_pictures_of_a_flow_of_many_levels(tmp_path: Path) -> None:
    train(tmp_path / "run", *LEVELS, "--train.steps", "1")
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 4, 4)
    options: dict[str, Any] = {"class_labels": [1], "latents": noise, "decoding": "student", "output_type": "latent"}
    pipe.student = small_student(pipe.flow, target="noisy")
    noisy = pipe(**options, denoise=False).images
    walked = pipe(**options, num_inference_steps=2).images
    labels = torch.tensor([1])
    torch.testing.assert_close(walked, pipe.remove_noise(noisy, True, labels, num_inference_steps=2))
    with pytest.raises(ValueError, match="decoding='student' knows samples of the highest level"):
        pipe(**options, noise_level=0.1)
    pipe.student = small_student(pipe.flow, target="clean")
    with pytest.raises(ValueError, match="this call removes no noise by the score"):
        pipe(**options, num_inference_steps=2)

    gen = {"pipeline": str(tmp_path / "run" / "pipeline"), "out": str(tmp_path / "sweep"), "num": 2, "batch_size": 2}
    config = SweepConfig(gen=GenerationConfig(**gen), match=True, num_inference_steps=[1, 3], denoise=[True, False])
    rows = run_sweep(config, measure=lambda folder: {"match_all": float(len(list(folder.glob("**/*.png"))))})
    assert [row["settings"]["num_inference_steps"] for row in rows] == [1, 3, None]
    assert [row["metrics"]["match_all"] for row in rows] == [2.0] * 3
    assert (tmp_path / "sweep" / "images" / "guidance-1_score_sequential_steps-3").is_dir()
    walked = GenerationConfig(**{**gen, "out": str(tmp_path / "walked")}, walk="sde")
    config = SweepConfig(gen=walked, match=True, num_inference_steps=[1, 2])  # one step has no walk
    assert len(run_sweep(config, measure=lambda folder: {"match_all": 1.0})) == 2
    config = SweepConfig(gen=replace(walked, out=str(tmp_path / "one")), match=True, num_inference_steps=[1])
    with pytest.raises(ValueError, match="walk is 'sde', but this call removes the noise in one step"):
        run_sweep(config, measure=lambda folder: {})
    with pytest.raises(ValueError, match="num_inference_steps was 1 there and is 2 here"):
        folder = tmp_path / "sweep" / "images" / "guidance-1_score_sequential_steps-1"
        generate_images(GenerationConfig(**{**gen, "out": str(folder)}, denoise=True, num_inference_steps=2))
    with pytest.raises(ValueError, match=r"noise_std is 0\.3, but this flow knows many noise levels"):
        generate_images(GenerationConfig(**{**gen, "out": str(tmp_path / "none")}, noise_std=0.3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--train.noise_levels.low", "0.5", "--train.noise_levels.high", "0.1"],
            "must have low below high, got low 0.5",
        ),
        (["--train.noise_levels.low", "0"], r"train\.noise_levels\.low must be positive, got 0"),
        (["--train.noise_levels.low", "-1"], r"train\.noise_levels\.low must be positive, got -1"),
        (["--train.noise_levels.distribution", "beta"], "uniform"),
        ([*LEVELS, "--flow.noise_conditioning", "false"], "flow.noise_conditioning is false: leave that out"),
        (["--flow.noise_conditioning", "true"], "give train.noise_levels, with low"),
        ([*LEVELS, "--flow.learned_denoiser", "unconditional"], r"need no flow\.learned_denoiser"),
        ([*PIXELS, "--train.noise", "uniform"], "set train.noise to gaussian"),
        ([*LEVELS, "--vae.train", "joint", "--train.noise_std", "0"], "are for a frozen autoencoder"),
        (["--log.num_inference_steps", "4"], r"log\.num_inference_steps is 4, but this flow knows one noise level"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(options: list[str], message: str, capsys: Any) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        parse_config(["--data", "{}", "--flow", CLASS_FLOW, "--output", "x", *options])
    assert message.replace("\\", "") in f"{caught.value} {capsys.readouterr().err}"


def test_one_level_is_compared_with_all(tmp_path: Path) -> None:
    began: list[list[str]] = []

    def trained(options: list[str]) -> None:
        began.append(options)
        *_, folder = options[: options.index("--output") + 2]
        places = [options.index(name) for name in options if name.startswith(("--train.noise", "--log.num"))]
        noise = [option for place in places for option in options[place : place + 2]]
        train(Path(folder), *PIXELS[:4], *noise, "--train.steps", "1", flow=PIXEL_FLOW)

    config = LevelComparisonConfig(
        out=str(tmp_path), highest=[0.5], low=0.1, steps=[1, 2], num=2, batch_size=2, match=True, columns=2
    )
    rows = compare_noise_levels(config, trained=trained, measure=lambda folder: {"match_all": 0.5})
    assert [(row["kind"], row["steps"]) for row in rows] == [("fixed", 1), ("levels", 1), ("levels", 2)]
    assert len(began) == 2
    table = (tmp_path / "noise_levels.md").read_text()
    assert "| 0.5 | this level | 1 |" in table and "| 0.5 | 0.1 to 0.5 | 2 |" in table
    assert (tmp_path / "samples_0.5.png").is_file() and (tmp_path / "noise_levels.json").is_file()
    again = compare_noise_levels(config, trained=trained, measure=lambda folder: {})
    assert again == rows and len(began) == 2  # nothing is done twice
    with pytest.raises(ValueError, match=r"has trainings with minutes 20\.0, not 5\.0: give another folder"):
        compare_noise_levels(replace(config, minutes=5.0), trained=trained)
    with pytest.raises(ValueError, match=r"the training in '.*fixed_0\.7' was stopped: the same command goes on"):
        compare_noise_levels(replace(config, highest=[0.7]), trained=lambda options: None)
    for changes, message in (
        ({"highest": [0.1]}, r"levels above low, 0\.1, got \[0\.1\]"),
        ({"steps": [0]}, r"steps must list numbers of at least 1, got \[0\]"),
        ({"match": False}, "nothing is measured"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **changes)
    with pytest.raises(ValueError, match="the training failed: tarflow train --config nothing"):
        run_training(["--config", "nothing"])

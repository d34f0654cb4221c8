"""Drawing with a trajectory model: numbers of steps, guidance, callbacks, folders, and what is for flows alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import perturb
from transformers import T5EncoderModel

from tarflow import TARFlowPipeline, TrajectoryFlowModel
from tarflow.cli.main import main
from tarflow.evaluation.reports.settings import SweepConfig
from tarflow.evaluation.reports.sweep import run_sweep
from tarflow.evaluation.samples.generation import generate_images
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.flows.trajectory.chain import level_of
from tarflow.pipeline.call.limits import estimate_bytes
from tarflow.training.flow.config import TextConfig
from tarflow.training.flow.start import Start
from tarflow.training.flow.text import small_t5, train_tokenizer
from tarflow.vae.codec import load_autoencoder

CAPTIONS = ["a red ring", "a blue star on a dark background"]


@pytest.fixture(scope="module")
def pipe():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TrajectoryFlowModel(
            in_channels=8,
            sample_size=4,
            layers_per_block=(1, 1, 1),
            width=64,
            head_dim=32,
            conditioning="prefix",
            cond_dim=16,
            steps=(2, 3),
        )
        config = TextConfig(kind="small", width=16, heads=2, layers=1, max_length=8)
        tokenizer = train_tokenizer(CAPTIONS, config)
        text_encoder = T5EncoderModel(small_t5(config, len(tokenizer))).eval()
        vae = load_autoencoder("drawings_emoji_f8c8")
        perturb(model, 0.05)
    pipe = TARFlowPipeline(
        model.eval(), vae, text_encoder, tokenizer, [0.1] * 8, [1.2] * 8, noise_std=0.3, max_sequence_length=8
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=CAPTIONS, seeds=(1, 2), **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"output_type": "latent", "decoding": "sequential", **options}
    return pipe(prompt, generator=generators, **options).images


def test_pictures_in_a_number_of_steps(pipe):
    images = pipe(CAPTIONS, num_inference_steps=3, guidance_scale=2.0, decoding="sequential").images
    assert [image.size for image in images] == [(32, 32)] * 2
    assert torch.equal(draw(pipe), draw(pipe, num_inference_steps=2))  # the first one is the default
    assert (draw(pipe) - draw(pipe, num_inference_steps=3)).abs().max() > 0.1


def test_a_picture_depends_on_its_own_generator_and_caption(pipe):
    both = draw(pipe, guidance_scale=2.0)
    assert torch.allclose(draw(pipe, CAPTIONS[1:], seeds=(2,), guidance_scale=2.0), both[1:], atol=1e-4)
    assert (draw(pipe, [CAPTIONS[0]] * 2, guidance_scale=2.0)[1] - both[1]).abs().max() > 1e-3
    assert (draw(pipe, guidance_scale=4.0) - both).abs().max() > 1e-3


def test_temperature_is_of_the_noise_of_all_steps(pipe):
    first = torch.zeros(2, 8, 4, 4)
    cold = [draw(pipe, seeds=seeds, latents=first, temperature=1e-6) for seeds in ((1, 2), (3, 4))]
    assert torch.allclose(*cold, atol=1e-3)


def test_given_latents_stay_as_they_are_where_the_noise_of_the_steps_has_the_pipelines_temperature(pipe):
    first = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    cool = copy.copy(pipe)
    cool.register_to_config(temperature=0.5)
    assert pipe.config.temperature == 1
    assert torch.allclose(draw(cool, latents=first), draw(pipe, latents=2 * first, temperature=0.5), atol=1e-5)
    assert (draw(cool, latents=first) - draw(pipe, latents=first)).abs().max() > 1e-2


def test_noise_is_removed_by_the_score_of_the_whole_chain_or_not_at_all(pipe):
    raw, clean = draw(pipe, denoise=False), draw(pipe, denoise=True)
    assert torch.equal(draw(pipe), clean)
    assert torch.equal(draw(pipe, denoise="none"), raw)
    moved = (raw - clean).std()
    assert 0.1 < moved < 0.6  # the noise that is left has a deviation of 0.3
    with pytest.raises(ValueError, match="no learned denoiser"):
        draw(pipe, denoise="learned")


def test_a_transporter_may_see_the_levels_of_its_states(pipe):
    other = copy.copy(pipe)
    arguments = {**pipe.flow.arguments, "transporter_levels": True}
    other.register_modules(flow=perturb(TrajectoryFlowModel(**arguments), 0.05).eval())
    ends = []
    keep = {"callback_on_step_end": lambda pipe, i, step, tensors: ends.append(tensors["latents"]) or {}}
    raw, last = draw(other, num_inference_steps=3, denoise=False, **keep), level_of(0.3)
    assert torch.allclose(other.flow(raw * (1 - last), last)[0], ends[-1], atol=1e-4)
    assert (other.flow(raw * (1 - last), 1.0)[0] - ends[-1]).abs().max() > 1e-3
    clean = draw(other, num_inference_steps=3, denoise=True)
    assert 0.1 < (raw - clean).std() < 0.6
    assert torch.allclose(draw(other, decoding="auto"), draw(other), atol=0.01)


def test_callbacks_see_each_step_and_may_change_or_end_it(pipe):
    seen = []

    def watch(pipe, index, step, tensors):
        seen.append((index, step, tensors["latents"].shape))
        return {}

    plain = draw(pipe, num_inference_steps=3, denoise=False)
    assert torch.equal(draw(pipe, num_inference_steps=3, denoise=False, callback_on_step_end=watch), plain)
    assert seen == [(i, i, torch.Size([2, 8, 4, 4])) for i in range(3)]
    assert pipe.num_timesteps == 3

    def swap(pipe, index, step, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 2 else {}

    zeros = draw(pipe, num_inference_steps=3, denoise=False, callback_on_step_end=swap)
    u, _ = pipe.flow(zeros * (1 - level_of(0.3)))
    assert u.abs().max() < 1e-4

    def stop(pipe, index, step, tensors):
        pipe._interrupt = index == 0
        return {}

    seen.clear()
    assert draw(pipe, num_inference_steps=3, callback_on_step_end=stop).isfinite().all()

    def guide(pipe, index, step, tensors):
        pipe._guidance_scale = 3.0
        return {}

    guided = draw(pipe, denoise=False, callback_on_step_end=guide)
    assert (guided - draw(pipe, denoise=False)).abs().max() > 1e-3


def test_residual_is_the_transporters(pipe):
    output = pipe(CAPTIONS, output_type="latent", decoding="sequential", return_residual=True)
    assert output.residual_max.shape == (2,)
    assert output.residual_max.max() < 1e-4
    swept = pipe(CAPTIONS, output_type="latent", decoding="jacobi", tolerance=1e-6, return_residual=True)
    assert swept.residual_max.max() < 1e-3


def test_save_and_load(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.flow, TrajectoryFlowModel)
    assert loaded.flow.config.steps == [2, 3] or loaded.flow.config.steps == (2, 3)
    assert torch.allclose(draw(loaded), draw(pipe), atol=1e-5)
    folder, out = str(tmp_path / "pipeline"), str(tmp_path / "x.png")
    main(["generate", "a red ring", "--pipeline", folder, "--num-inference-steps", "3", "--out", out, "--seed", "1"])
    assert (tmp_path / "x.png").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "a red ring", "--pipeline", folder, "--steps", "5", "--out", out])
    assert "trained with 2, 3 steps: num_inference_steps cannot be 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "must be a whole number, got 2.5"),
        ({"num_inference_steps": 4}, "trained with 2, 3 steps: num_inference_steps cannot be 4"),
        ({"decoding": "student"}, "no student"),
        ({"attention_temperature": 2.0, "guidance_scale": 2.0}, "got 2.0: leave it out"),
    ],
)
def test_calls_that_cannot_be(pipe, options, told):
    with pytest.raises(ValueError, match=told):
        draw(pipe, **options)


def test_flows_have_no_steps_to_choose():
    from tarflow import TARFlowModel

    flow = TARFlowModel(in_channels=3, sample_size=4, layers_per_block=(1,), width=64).eval()
    with pytest.raises(ValueError, match="num_inference_steps is 4, but this flow knows one noise level"):
        TARFlowPipeline(flow)(num_inference_steps=4)


def test_what_is_for_flows_alone_says_so(pipe):
    picture = torch.zeros(1, 3, 32, 32)
    for use in (
        lambda: pipe.log_likelihood(picture, "a red ring"),
        lambda: pipe.encode(picture, "a red ring"),
        lambda: pipe.load_lora_weights({}),
        lambda: pipe.remove_noise(torch.zeros(1, 8, 4, 4), True),
    ):
        with pytest.raises(ValueError, match="for flows, and this pipeline has a trajectory model"):
            use()


def test_weights_that_are_fetched_and_inference_mode(pipe):
    expected = draw(pipe, guidance_scale=2.0)
    with torch.inference_mode():
        assert torch.allclose(draw(pipe, guidance_scale=2.0), expected, atol=1e-5)
        made = copy.deepcopy(pipe)
        assert next(made.flow.parameters()).is_inference()
        assert torch.allclose(draw(made, guidance_scale=2.0), expected, atol=1e-5)
    for kind in ({"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}):
        moved = copy.deepcopy(pipe)
        moved.flow.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **kind)
        assert torch.allclose(draw(moved, guidance_scale=2.0), expected, atol=1e-5)


def test_memory_is_estimated_with_the_predictor(pipe):
    assert estimate_bytes(pipe, 8) > estimate_bytes(pipe, 1) > 0


def test_images_are_drawn_measured_and_recorded_by_their_number_of_steps(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    gen = {
        "pipeline": str(tmp_path / "pipeline"),
        "num": 2,
        "batch_size": 2,
        "captions": str(tmp_path / "captions.txt"),
    }
    config = GenerationConfig(**gen, out=str(tmp_path / "images"))
    generate_images(config, pipe=pipe)
    for steps in (2, None):  # the first one is the default
        assert generate_images(replace(config, num_inference_steps=steps), pipe=pipe)["generated"] == 0
    with pytest.raises(ValueError, match="num_inference_steps was 2 there and is 3 here"):
        generate_images(replace(config, num_inference_steps=3), pipe=pipe)
    with pytest.raises(ValueError, match=r"noise_std is 0\.2, but a trajectory model's chain ends at the noise"):
        generate_images(replace(config, noise_std=0.2), pipe=pipe)
    sweep = SweepConfig(
        gen=GenerationConfig(**gen, out=str(tmp_path / "sweep")),
        denoise=[False],
        num_inference_steps=[2, 3],
        match=True,
    )
    rows = run_sweep(sweep, measure=lambda folder: {"match_all": 0.5})
    settings = [(row["settings"]["denoise"], row["settings"]["num_inference_steps"]) for row in rows]
    assert settings == [(False, 2), (False, 3)]
    with pytest.raises(ValueError, match="trained with 2, 3 steps: num_inference_steps cannot be 5"):
        run_sweep(replace(sweep, num_inference_steps=[5]), measure=lambda folder: {})


def test_settings_of_another_kind_of_model_are_refused_by_name(pipe):
    start = Start(pipe, "runs/some")
    with pytest.raises(ValueError, match=r"flow\.actnorm is True, but the pipeline 'runs/some' has a model of kind"):
        start.flow_settings({"actnorm": True})
    with pytest.raises(ValueError, match=r"flow\.kind is flow, but the pipeline 'runs/some' has trajectory"):
        start.flow_settings({"actnorm": True, "kind": "flow"})
    assert start.flow_settings({"width": 64})["kind"] == "trajectory"


def test_adapters_are_for_flows(pipe) -> None:
    pipe.unload_lora_weights()  # there are none: nothing to do
    for call in (pipe.fuse_lora, pipe.unfuse_lora, pipe.disable_lora, pipe.enable_lora, lambda: pipe.set_adapters("a")):
        with pytest.raises(ValueError, match="adapters are for flows"):
            call()


def test_a_pipelines_own_number_of_steps(pipe) -> None:
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer")}
    made = TARFlowPipeline(pipe.flow, **parts, noise_std=0.3, max_sequence_length=8, num_inference_steps=3)
    made.set_progress_bar_config(disable=True)
    seen: list[int] = []
    made(CAPTIONS, callback_on_step_end=lambda pipe, index, *_: seen.append(pipe.num_timesteps) or {})
    assert seen == [3, 3, 3]
    with pytest.raises(ValueError, match="was trained with 2, 3 steps: num_inference_steps cannot be 4"):
        TARFlowPipeline(pipe.flow, **parts, num_inference_steps=4)
    with pytest.raises(
        ValueError, match="guidance_blocks is for flows, not for trajectory models, got 'deep': leave it out"
    ):
        draw(pipe, guidance_scale=2, guidance_blocks="deep")

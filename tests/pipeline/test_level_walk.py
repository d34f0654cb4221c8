"""From noise level to noise level: the schedule's numbers, exchanged schedulers, calls, and arguments that cannot be."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from PIL import Image
from pipelines import make_pipeline
from torch import Tensor

from tarflow import TARFlowPipeline
from tarflow.benchmarks.exactness import exactness
from tarflow.benchmarks.published_sampler import generate_as_published
from tarflow.benchmarks.runs import conditions
from tarflow.cli.main import main
from tarflow.demo.drawing import Request, checked, draw
from tarflow.demo.rebuild import rebuild
from tarflow.experiments.peers.drawing import FlowDrawer
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.denoising import score_denoise
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.likelihood import log_prob
from tarflow.pipeline.call.scheduler import EDMAncestralScheduler
from tarflow.pipeline.call.walk import check_own_level, default_scheduler, scheduler_for, walk_down

LEVELS = (0.02, 0.5)


def make(conditioning: str = "class_vectors", vae: bool = False) -> TARFlowPipeline:
    """A pipeline of two blocks for the levels 0.02 to 0.5."""
    torch.manual_seed(0)
    return make_pipeline(conditioning, vae=vae, noise_levels=LEVELS, noise_conditioning=True)


def seeds(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def clean(x: Tensor, level: float) -> Tensor:
    """Some function of both, far from linear."""
    return torch.sin(3 * x) * (1 - level)


def levels_of(steps: int) -> list[float]:
    low, high = LEVELS
    spaced = [high + i * (low - high) / max(steps - 1, 1) for i in range(steps)]
    return [*spaced, 0.0]


def published_ode(x: Tensor, steps: int) -> Tensor:
    levels = levels_of(steps)
    for level, lower in itertools.pairwise(levels):
        x = x - (x - clean(x, level)) / level * (level - lower)
    return x


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_the_default_is_diffusers_euler_with_the_published_numbers(steps: int) -> None:
    x = torch.randn(2, 3, 4, 4)
    scheduler = scheduler_for(default_scheduler(LEVELS), 0.5, steps, None, x.device)
    assert type(scheduler) is EDMEulerScheduler
    assert scheduler.sigmas.tolist() == pytest.approx(levels_of(steps), abs=1e-6)
    assert (walk_down(scheduler, x, clean) - published_ode(x, steps)).abs().max() < 1e-5
    scheduler = scheduler_for(default_scheduler(LEVELS), 0.5, steps, "ode", x.device)
    big = walk_down(scheduler, 9 * x, lambda x, level: 9 * clean(x, level), clamp=True)
    assert big.abs().max() < 1 + 1e-5  # the last step gives the clamped estimate


@pytest.mark.parametrize("steps", [1, 5])
def test_the_stochastic_walk_has_the_published_numbers(steps: int) -> None:
    x = torch.randn(2, 3, 4, 4)
    scheduler = scheduler_for(default_scheduler(LEVELS), 0.5, steps, "sde", x.device)
    found = walk_down(scheduler, x, clean, generator=seeds())
    levels, generators, expected = levels_of(steps), seeds(), x
    for level, lower in itertools.pairwise(levels):
        noise = torch.stack([torch.randn(3, 4, 4, generator=one) for one in generators])
        original, share = clean(expected, level), (lower / level) ** 2
        direction = share**0.5 * (expected - original) / level + (1 - share) ** 0.5 * noise
        expected = original + lower * direction
    assert (found - expected).abs().max() < 1e-5
    alone = walk_down(
        scheduler_for(default_scheduler(LEVELS), 0.5, steps, "sde", x.device), x[1:], clean, generator=seeds()[1:]
    )
    torch.testing.assert_close(alone, found[1:])


def test_the_stochastic_step_without_an_estimate_reads_a_networks_output() -> None:
    x, output = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    results = []
    for given in (False, True):
        scheduler = scheduler_for(default_scheduler(LEVELS), 0.5, 3, "sde", x.device)
        estimate = scheduler.precondition_outputs(x, output, scheduler.sigmas[0])
        options = {"pred_original_sample": estimate} if given else {}
        results.append(scheduler.step(output, scheduler.timesteps[0], x, seeds(1), **options))
    torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample)
    torch.testing.assert_close(results[0].pred_original_sample, results[1].pred_original_sample)


def test_other_schedulers_of_levels_get_the_estimate_as_a_networks_output() -> None:
    own = EDMDPMSolverMultistepScheduler.from_config(default_scheduler(LEVELS).config, solver_order=1)
    x = torch.randn(2, 3, 4, 4)
    found = walk_down(scheduler_for(own, 0.5, 6, None, x.device), x, clean)
    assert (found - published_ode(x, 6)).abs().max() < 1e-4  # of first order it is Euler's step
    for wrong in (EulerDiscreteScheduler(), None):
        with pytest.raises(ValueError, match="does not walk from noise level to noise level: take EDMEulerScheduler"):
            scheduler_for(wrong, 0.5, 6, None, x.device)


def test_a_call_draws_at_the_highest_level_and_walks_down() -> None:
    pipe = make()
    options: dict[str, Any] = {"class_labels": [0, 2], "output_type": "latent", "decoding": "sequential"}
    noise = torch.randn(2, 3, 4, 4)
    raw = pipe(**options, latents=noise, denoise=False).images
    labels = torch.tensor([0, 2])
    expected, _ = pipe.flow.inverse(noise, labels, noise_level=0.5)
    torch.testing.assert_close(raw, expected)
    one = pipe(**options, latents=noise, num_inference_steps=1).images
    torch.testing.assert_close(one, score_denoise(pipe.flow, raw, 0.5, labels).clamp(-1, 1))
    torch.testing.assert_close(pipe(**options, latents=noise).images, one)  # the default of this pipeline
    several = pipe(**options, latents=noise, num_inference_steps=3).images
    x = raw
    for level, lower in zip(levels_of(3)[:-1], levels_of(3)[1:], strict=True):
        x = x - (x - score_denoise(pipe.flow, x, level, labels).clamp(-1, 1)) / level * (level - lower)
    torch.testing.assert_close(several, x, rtol=0, atol=1e-5)
    lower = pipe(**options, latents=noise, denoise=False, noise_level=0.1).images
    torch.testing.assert_close(lower, pipe.flow.inverse(noise, labels, noise_level=0.1)[0])
    residual = pipe(**options, latents=noise, noise_level=0.1, return_residual=True, num_inference_steps=2)
    assert residual.residual_max is not None
    assert residual.residual_max.max() < 1e-4


def test_callbacks_hear_of_each_level_and_may_change_or_end_it() -> None:
    pipe, seen = make(), []
    options: dict[str, Any] = {"class_labels": [0], "output_type": "latent", "num_inference_steps": 3}
    noise = torch.randn(1, 3, 4, 4)

    def listen(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, float(timestep), pipe.num_timesteps, tensors["latents"]))
        return {}

    plain = pipe(**options, latents=noise, callback_on_step_end=listen).images
    assert [(index, count) for index, _, count, _ in seen] == [(i, 5) for i in range(5)]
    schedule = scheduler_for(pipe.scheduler, 0.5, 3, None, noise.device)
    assert [step for _, step, _, _ in seen] == pytest.approx([0, 1, *schedule.timesteps.tolist()])
    torch.testing.assert_close(seen[-1][3], plain)

    def end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = index == 3
        return {"latents": tensors["latents"] + 1} if index == 3 else {}

    ended = pipe(**options, latents=noise, callback_on_step_end=end).images
    torch.testing.assert_close(ended, seen[3][3] + 1)

    def end_early(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = index == 1
        return {}

    torch.testing.assert_close(pipe(**options, latents=noise, callback_on_step_end=end_early).images, seen[1][3])
    assert pipe(**{**options, "num_inference_steps": 1}) is not None
    assert pipe.num_timesteps == 2


def test_a_picture_does_not_depend_on_the_others_of_its_batch() -> None:
    pipe = make()
    options: dict[str, Any] = {"output_type": "latent", "num_inference_steps": 3, "walk": "sde", "guidance_scale": 2.0}
    both = pipe(class_labels=[0, 1], generator=seeds(), **options).images
    alone = pipe(class_labels=[1], generator=seeds()[1:], **options).images
    torch.testing.assert_close(alone, both[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["ode", "sde", "dpm"])
def test_the_scheduler_is_saved_and_loaded_with_the_pipeline(scheduler: str, tmp_path: Path) -> None:
    pipe = make("none")
    kinds = {"ode": EDMEulerScheduler, "sde": EDMAncestralScheduler, "dpm": EDMDPMSolverMultistepScheduler}
    pipe.scheduler = kinds[scheduler].from_config(pipe.scheduler.config)
    pipe.register_to_config(num_inference_steps=4)
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is kinds[scheduler]
    assert (loaded.noise_levels, loaded.config.num_inference_steps, loaded.config.noise_std) == (LEVELS, 4, 0.5)
    options: dict[str, Any] = {"num_images": 2, "output_type": "latent", "decoding": "sequential"}
    first, second = (one(**options, generator=seeds()).images for one in (pipe, loaded))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    steps = pipe(**options, generator=seeds(), num_inference_steps=1).images
    assert (steps - first).abs().max() > 1e-4


@pytest.mark.parametrize("conditioning", ["prefix", "class_prefix"])
def test_latents_with_captions_or_classes(conditioning: str) -> None:
    pipe = make(conditioning, vae=True)
    given: dict[str, Any] = {"prompt": ["a red ring"]} if conditioning == "prefix" else {"class_labels": [1]}
    options = {**given, "guidance_scale": 2.0, "output_type": "pt", "num_inference_steps": 2}
    images = [pipe(**options, guidance_blocks=blocks, generator=seeds(1)).images for blocks in ("all", "deep")]
    assert images[0].shape == (1, 3, 32, 32)
    assert (images[0] - images[1]).abs().max() > 0
    assert pipe.log_likelihood(images[0], **given, noise_level=0.02).log_prob.isfinite().all()


def test_likelihood_and_editing_are_at_a_stated_level() -> None:
    pipe = make()
    picture, generator = Image.new("RGB", (4, 4), (200, 30, 60)), torch.Generator()
    found = pipe.log_likelihood(picture, class_labels=1, noise_level=0.1, generator=generator.manual_seed(3))
    pixels = torch.tensor([200, 30, 60]).view(1, 3, 1, 1).expand(1, 3, 4, 4) / 127.5 - 1
    noise = torch.randn(1, 3, 4, 4, generator=generator.manual_seed(3))
    expected = log_prob(pipe.flow, pixels + 0.1 * noise, torch.tensor([1]), noise_level=0.1)
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-3)
    assert found.map.shape == (1, 4, 4)
    encoded = pipe.encode(picture, class_labels=1, generator=generator)
    assert encoded.error.max() < 1e-4
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0] = True
    edits = [
        pipe.vary(picture, 0.3, class_labels=1, generator=generator),
        pipe.swap(picture, source_labels=0, target_labels=1, guidance_scale=2.0, generator=generator),
        pipe.interpolate(picture, picture, 2, generator=generator),
        pipe.inpaint(picture, mask, class_labels=1, passes=1, method="metropolis", steps=1, generator=generator),
        pipe.best_of(2, class_labels=1, generator=generator),
    ]
    assert all(edit.images is not None for edit in edits)


def test_a_decoder_or_a_student_knows_the_highest_level_alone() -> None:
    pipe = make()
    with pytest.raises(ValueError, match="has no student"):
        pipe(class_labels=[0], decoding="student", num_inference_steps=2)
    check_own_level(0.5, 0.5, True, "finetuned")
    with pytest.raises(ValueError, match=r"decoding='student' knows samples of the highest level, 0\.5"):
        check_own_level(0.5, 0.1, True, "vae")
    with pytest.raises(ValueError, match=r"decoder='finetuned' knows samples of the highest level, 0\.5"):
        check_own_level(0.5, 0.1, False, "finetuned")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, got 2.5"),
        ({"num_inference_steps": True}, "num_inference_steps must be a whole number, got True"),
        ({"num_inference_steps": 2, "denoise": False}, "this call removes no noise by the score"),
        ({"noise_level": 0.9}, r"noise_level must be in the trained levels, 0\.02 to 0\.5, got 0\.9"),
        ({"noise_level": 0.0}, r"noise_level must be in the trained levels, 0\.02 to 0\.5, got 0\.0"),
        ({"noise_level": "high"}, "noise_level must be a number, got 'high'"),
        ({"noise_level": 0.02, "num_inference_steps": 2}, "is the lowest, from which there is one step"),
        ({"walk": "up"}, "walk must be None, 'ode' or 'sde', got 'up'"),
        ({"walk": "sde"}, "walk is 'sde', but this call removes the noise in one step, where all walks are the same"),
        ({"walk": "ode", "num_inference_steps": 1}, "give num_inference_steps above 1, or leave it out"),
        ({"walk": "ode", "denoise": False}, "walk is 'ode', but this call removes no noise by the score"),
        ({"denoise": "learned"}, "has no learned denoiser"),
        ({"guidance_blocks": "shallow", "guidance_scale": 2.0}, "'all' or 'deep', got 'shallow'"),
    ],
)
def test_calls_that_cannot_be_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(class_labels=[0], **options)


def test_from_the_lowest_level_there_is_one_step_whatever_the_default() -> None:
    pipe = make()
    pipe.register_to_config(num_inference_steps=4)
    assert pipe(class_labels=[0], noise_level=0.02, output_type="latent").images.isfinite().all()
    assert pipe.num_timesteps == 2
    with pytest.raises(ValueError, match="is the lowest, from which there is one step"):
        pipe(class_labels=[0], noise_level=0.02, num_inference_steps=2)
    for steps in (None, 1):  # more steps would be refused, so that is not the advice
        with pytest.raises(
            ValueError, match=r"noise_level 0\.02 is the lowest, .*: leave walk out, or give a higher noise_level"
        ):
            pipe(class_labels=[0], noise_level=0.02, walk="sde", num_inference_steps=steps)
    with pytest.raises(ValueError, match="leave walk out, or give a higher noise_level"):
        pipe.remove_noise(torch.zeros(1, 3, 4, 4), True, torch.tensor([0]), noise_level=0.02, walk="ode")


def test_no_scheduler_leads_below_the_trained_levels() -> None:
    for kind in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler):
        own = scheduler_for(kind(), 0.5, 4, None, torch.device("cpu"), 0.02)  # its own lowest level is 0.002
        assert own.sigmas.tolist() == pytest.approx(sorted(own.sigmas.tolist(), reverse=True))
        assert [float(own.sigmas[i]) for i in (0, 3, 4)] == pytest.approx([0.5, 0.02, 0])
        low = scheduler_for(kind(sigma_min=0.3), 0.1, 3, None, torch.device("cpu"), 0.02)
        assert low.sigmas.tolist() == pytest.approx([0.1, 0.1, 0.1, 0])
    pipe, seen = make(), []
    pipe.scheduler = EDMEulerScheduler()
    pipe.remove_noise(
        torch.randn(1, 3, 4, 4),
        True,
        torch.tensor([1]),
        num_inference_steps=3,
        after_level=lambda _, timestep, x: (seen.append(float((4 * timestep).exp())), (x, False))[1],
    )
    assert seen[-1] == pytest.approx(0.02)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMAncestralScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_one_step_of_any_scheduler_is_the_score_step(kind: Any, schedule: str) -> None:
    pipe, noise = make(), torch.randn(1, 3, 4, 4)
    options: dict[str, Any] = {"class_labels": [1], "latents": noise, "output_type": "latent", "decoding": "sequential"}
    raw = pipe(**options, denoise=False).images
    pipe.scheduler = kind(sigma_schedule=schedule)
    expected = score_denoise(pipe.flow, raw, 0.5, torch.tensor([1])).clamp(-1, 1)
    torch.testing.assert_close(pipe(**options, num_inference_steps=1).images, expected, rtol=0, atol=1e-5)
    sigmas = scheduler_for(pipe.scheduler, 0.5, 3, None, noise.device, 0.02).sigmas.tolist()
    assert (sigmas[0], sigmas[2], sigmas[3]) == pytest.approx((0.5, 0.02, 0))


def test_a_scheduler_that_does_not_go_down_is_refused() -> None:
    pipe = make()
    pipe.scheduler = EDMEulerScheduler(final_sigmas_type="sigma_min")
    with pytest.raises(
        ValueError, match=r"EDMEulerScheduler goes through the levels 0\.5, 0\.5, but samples have the level"
    ):
        pipe(class_labels=[1])
    kept = pipe(class_labels=[1], num_inference_steps=3, output_type="latent").images
    assert kept.isfinite().all()  # with noise of the lowest level, as its user wants it


def test_edits_repeat_with_their_generator_whatever_the_scheduler() -> None:
    pipe = make()
    pipe.scheduler = EDMAncestralScheduler.from_config(pipe.scheduler.config)
    pipe.register_to_config(num_inference_steps=3)
    picture = Image.new("RGB", (4, 4), (200, 30, 60))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0] = True
    given: dict[str, Any] = {"class_labels": 1, "output_type": "latent"}
    for edit in (
        lambda generator: pipe.vary(picture, 0.3, generator=generator, **given),
        lambda generator: pipe.interpolate(picture, picture, 3, generator=generator, **given),
        lambda generator: pipe.inpaint(picture, mask, generator=generator, passes=1, **given),
        lambda generator: pipe.best_of(2, generator=generator, **given),
    ):
        torch.manual_seed(0)
        first = edit(torch.Generator().manual_seed(5)).latents
        again = edit(torch.Generator().manual_seed(5)).latents
        torch.testing.assert_close(again, first, rtol=0, atol=5e-3)  # "auto" may decode in another way
    each = pipe.interpolate(picture, picture, 3, generator=seeds(), **given)  # one for each picture that is given
    assert each.latents.shape == (3, 3, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 2}, "num_inference_steps is 2, but this flow knows one noise level"),
        ({"noise_level": 0.3}, r"noise_level is 0\.3, but this flow knows the one level of its training"),
        ({"walk": "ode"}, "walk is 'ode', but this flow knows one noise level"),
    ],
)
def test_a_flow_of_one_level_takes_none_of_it(options: dict[str, Any], message: str) -> None:
    pipe = make_pipeline("none", vae=False)
    with pytest.raises(ValueError, match=message):
        pipe(num_images=1, **options)
    assert pipe(num_images=1, num_inference_steps=1, output_type="latent").images.shape == (1, 3, 4, 4)


def test_pipelines_whose_parts_do_not_fit() -> None:
    pipe = make("none")
    for levels, message in (
        (None, "the flow has noise_conditioning: give noise_levels"),
        ((0.5, 0.02), r"0 < low < high, got \[0\.5, 0\.02\]"),
        ((0.0, 0.5), r"0 < low < high, got \[0\.0, 0\.5\]"),
        ((0.5,), r"0 < low < high, got \[0\.5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            TARFlowPipeline(pipe.flow, noise_levels=levels)
    plain = make_pipeline("none", vae=False).flow
    with pytest.raises(ValueError, match="the flow knows one noise level"):
        TARFlowPipeline(plain, noise_levels=LEVELS)
    with pytest.raises(ValueError, match="a scheduler is for a flow of many noise levels"):
        TARFlowPipeline(plain, scheduler=default_scheduler(LEVELS))


@pytest.mark.parametrize("conditioning", ["prefix", "class_vectors", "none"])
def test_speed_and_exactness_are_measured_at_the_highest_level(conditioning: str) -> None:
    pipe = make(conditioning)
    cond, null = conditions(pipe.flow, None, 2, pipe.drawing_level)
    rows = list(exactness("tiny", pipe.flow, cond, null, scales=(2.0,), samples=2))
    assert [row.largest < (0.1 if "fast" in row.method else 1e-3) for row in rows] == [True] * 6
    z, guidance = torch.randn(2, 3, 4, 4), Guidance(1.0)
    published = generate_as_published(pipe.flow, z, cond, null, guidance)
    torch.testing.assert_close(published, generate(pipe.flow, z, cond, null, guidance)[0], rtol=0, atol=1e-4)


def test_a_round_trip_beside_peers_is_at_the_highest_level(tmp_path: Path) -> None:
    make("class_vectors").save_pretrained(tmp_path / "pipeline")
    assert FlowDrawer(tmp_path / "pipeline", "class", 1.0).round_trip([0, 1]) < 1e-4


def test_the_page_rebuilds_a_picture_at_the_highest_level() -> None:
    pipe = make("class_vectors")
    rebuilt = rebuild(pipe, Image.new("RGB", (9, 5), (200, 30, 60)), label=1)
    assert rebuilt.quantity == "pixel_nats_per_dim"
    assert rebuilt.error < 1e-4


def test_the_page_shows_each_level() -> None:
    pipe = make("none")
    request = checked(pipe, Request(decoding="sequential", steps=3))
    *_, last = draw(pipe, request, threading.Lock(), threading.Event())
    names = [stage.name for stage in last.stages]
    assert names == ["noise", "block 1", "block 2, raw", "level 1 of 3", "level 2 of 3", "noise removed"]
    with pytest.raises(ValueError, match="The number of steps must be a whole number from 1 to 100"):
        checked(pipe, Request(steps=0))
    assert checked(make_pipeline("none", vae=False), Request(steps=3)).steps is None  # one level has one step


def test_the_command_line_takes_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("none").save_pretrained(tmp_path / "pipeline")
    options = ["generate", "--pipeline", str(tmp_path / "pipeline"), "--seed", "1", "--device", "cpu"]
    main([*options, "--out", str(tmp_path / "x.png"), "--steps", "3", "--walk", "sde", "--noise-level", "0.4"])
    assert (tmp_path / "x.png").is_file()
    for wrong, message in (
        (["--noise-level", "0.9"], "noise_level must be in the trained levels, 0.02 to 0.5, got 0.9"),
        (["--steps", "0"], "--num-inference-steps must be at least 1, got 0"),
        (["--noise-level", "-1"], "--noise-level must be positive, got -1"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*options, "--out", str(tmp_path / "y.png"), *wrong])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "y.png").exists()

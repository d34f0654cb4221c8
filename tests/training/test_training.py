"""The trainer: loss falls, weights change, resuming is bit-identical, bad input gives one sentence."""

from __future__ import annotations

import json
import zipfile
from types import SimpleNamespace

import pytest
import torch
from fid_helpers import write_pictures
from PIL import Image
from trainings import CLASS_FLOW, PIXEL_FLOW, TEXT_FLOW, train, weights

from tarflow import TARFlowPipeline
from tarflow.data.images import collate, to_model
from tarflow.flows.denoising import learned_denoise, score_denoise
from tarflow.flows.model import TARFlowModel
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.objective import score_target
from tarflow.training.flow.setup import first_places
from tarflow.training.flow.text import looked_at, unknown_report
from tarflow.training.loop.batches import StepSampler, fixed_batches
from tarflow.training.loop.config import OptimConfig
from tarflow.training.loop.reading import check_scaler
from tarflow.training.loop.schedule import schedule_factor
from tarflow.training.loop.trainer import Trainer
from tarflow.vae.codec import load_autoencoder


def test_loss_falls_and_pipeline_works(tmp_path):
    _, early = train(tmp_path / "a", "--train.steps", "1", "--log.sample_every", "1", "--log.sample_images", "4")
    _, late = train(tmp_path / "b", "--train.steps", "30")
    assert late["latent_nats_per_dim"] < early["latent_nats_per_dim"] - 0.05
    assert (tmp_path / "a" / "samples" / "samples_00000001.png").is_file()
    assert (tmp_path / "a" / "samples" / "samples_00000001_raw.png").is_file()
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "b" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=["red circle", 3]).images[1].size == (32, 32)


def test_a_deep_block_from_coarse_to_fine_is_trained_saved_and_drawn_by_sweeps(tmp_path):
    options = ["--flow.deep_order", "coarse_to_fine", "--train.steps", "10", "--train.mixed_precision", "no"]
    train(tmp_path, *options)
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert [block.config.order for block in pipe.flow.blocks] == ["reversed", "coarse_to_fine"]
    drawn = [
        pipe(class_labels=[0, 3], decoding=how, output_type="latent", denoise=False, generator=[torch.Generator()] * 2)
        for how in ("sequential", "jacobi")
    ]
    torch.testing.assert_close(drawn[0].images, drawn[1].images, rtol=0, atol=1e-3)
    assert weights(tmp_path)["blocks.1.proj_in.weight"].shape[1] == 5 * pipe.flow.config.in_channels


@pytest.mark.parametrize("kind", ["text", "folder", "muon"])
def test_resume_is_bit_identical(tmp_path, kind):
    if kind in ("text", "muon"):  # a trained text encoder, gradient accumulation
        options = ["--text.kind", "small", "--text.width", "16", "--text.layers", "1", "--train.accumulation", "2"]
        options += ["--optim.name", "muon", "--optim.muon_lr", "2e-3"] if kind == "muon" else []
        flow = TEXT_FLOW
    else:  # a shuffled folder, stopped in the middle of its second epoch
        images = tmp_path / "images"
        for i in range(20):
            (images / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i * 12, 255 - i * 12, 90)).save(images / f"class{i % 2}" / f"{i}.png")
        options = ["--data.source", "folder", "--data.path", str(images), "--data.flip", "true"]
        flow = CLASS_FLOW
    options += ["--train.steps", "6"]
    train(tmp_path / "whole", *options, flow=flow)
    train(tmp_path / "parts", *options, "--log.checkpoint_every", "4", flow=flow)
    resume = str(tmp_path / "parts" / "checkpoints" / "step_00000004")
    trainer, _ = train(tmp_path / "again", *options, "--resume", resume, flow=flow)
    assert trainer.step == 6
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_other_passes_from_an_odd_step_on_are_the_same_training(tmp_path):
    options = ["--train.steps", "6", "--train.accumulation", "1"]
    train(tmp_path / "whole", *options)
    train(tmp_path / "parts", *options, "--log.checkpoint_every", "3")
    resume = ["--resume", str(tmp_path / "parts" / "checkpoints" / "step_00000003")]
    train(tmp_path / "again", *options, "--train.batch_size", "4", "--train.accumulation", "2", *resume)
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.allclose(whole[key], again[key], atol=1e-5) for key in whole)


def test_a_limit_in_minutes_that_is_new_ends_nothing(tmp_path):
    train(tmp_path, "--train.steps", "2", "--log.checkpoint_every", "2")
    trainer, _ = train(tmp_path, "--train.steps", "4", "--train.max_minutes", "5", "--resume", "latest")
    assert trainer.step == 4


def test_another_limit_in_minutes_counts_anew(tmp_path):
    options = ["--log.checkpoint_every", "1", "--train.steps", "9"]
    trainer, _ = train(tmp_path, *options, "--train.max_minutes", "1e-4")
    assert trainer.lowered and 1 <= trainer.step < 9
    done = trainer.step
    same, _ = train(tmp_path, *options, "--train.max_minutes", "1e-4", "--resume", "latest")
    assert same.step == done  # the run was at its end
    other, _ = train(tmp_path, *options, "--train.max_minutes", "10", "--resume", "latest")
    assert other.step == 9


def test_a_limit_that_was_lifted_does_not_end_later_runs(tmp_path):
    options = ["--log.checkpoint_every", "1"]
    first, _ = train(tmp_path, *options, "--train.steps", "99", "--train.max_minutes", "1e-4")
    longer = str(first.step + 1)
    train(tmp_path, *options, "--train.steps", longer, "--resume", "latest")
    last = ["--train.steps", str(first.step + 3), "--train.max_minutes", "1e-4", "--resume", "latest"]
    trainer, _ = train(tmp_path, *options, *last)
    assert trainer.step > int(longer)


def test_other_latents_or_noise_are_another_run(tmp_path):
    train(tmp_path / "run", "--train.steps", "1", "--log.checkpoint_every", "1")
    on = ["--train.steps", "2", "--resume", "latest"]
    with pytest.raises(ValueError, match=r"differs: train\.noise_std is 0\.3 there and 1\.0 here"):
        train(tmp_path / "run", *on, "--train.noise_std", "1.0")
    other = load_autoencoder("drawings_emoji_f8c8")
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="trained on latents of another autoencoder"):
        train(tmp_path / "run", *on, "--vae.name", str(tmp_path / "vae"))
    file = tmp_path / "run" / "checkpoints" / "step_00000001" / "run.json"
    state = json.loads(file.read_text())
    trainer, _ = train(tmp_path / "run", *on, "--vae.measure_images", "0")
    codec = trainer.task.parts.codec
    assert [codec.latents_mean, codec.latents_std] == state["statistics"]


def test_other_pictures_are_another_run(tmp_path):
    pictures = str(write_pictures(tmp_path / "pictures", 40, size=(32, 32)))
    source = ["--data.source", "folder", "--data.path", pictures, "--data.validation_fraction", "0.3"]
    flow = CLASS_FLOW.replace("class_prefix", "none")
    options = [*source, "--log.checkpoint_every", "1"]
    train(tmp_path / "run", *options, "--train.steps", "1", flow=flow)
    on = [*options, "--train.steps", "2", "--resume", "latest"]
    for more, message in (
        (["--train.seed", "5"], r"trained with train\.seed 0, but here it is 5, which makes another run"),
        (["--vae.sample_posterior", "false"], r"trained with vae\.sample_posterior True, but here it is False"),
        (["--data.validation_fraction", "0.6"], r"trained with training pictures \d+, but here it is \d+"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", *on, *more, flow=flow)
    trainer, _ = train(tmp_path / "run", *on, flow=flow)
    assert trainer.step == 2
    assert "resume: null" in (tmp_path / "run" / "config.yaml").read_text()


def test_another_small_text_encoder_is_no_damage(tmp_path):
    small = ["--text.kind", "small", "--text.width", "16", "--text.heads", "2", "--text.layers", "1"]
    options = [*small, "--log.checkpoint_every", "1"]
    train(tmp_path, *options, "--train.steps", "1", flow=TEXT_FLOW)
    for name, value in (("layers", "2"), ("heads", "4")):
        with pytest.raises(ValueError, match=rf"was trained with text\.{name} \d, but it is {value} here"):
            more = ["--train.steps", "2", "--resume", "latest", f"--text.{name}", value]
            train(tmp_path, *options, *more, flow=TEXT_FLOW)


def test_a_tokenizer_knows_the_end_of_sorted_captions(tmp_path):
    names = [path.name for path in sorted(write_pictures(tmp_path, 60, size=(32, 32)).iterdir())]
    lines = [json.dumps({"file_name": name, "text": f"{chr(97 + i // 4)}word"}) for i, name in enumerate(names)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = ["--data.source", "folder", "--data.path", str(tmp_path), "--data.validation_fraction", "0"]
    source += ["--data.caption_column", "text", "--text.kind", "small", "--text.width", "16", "--text.heads", "2"]
    out = tmp_path.with_name("run")
    trainer, _ = train(out, *source, "--train.steps", "1", "--text.vocab_captions", "15", flow=TEXT_FLOW)
    parts = trainer.task.parts
    assert {f"{chr(97 + i)}word" for i in range(15)} <= set(parts.tokenizer.get_vocab())
    assert unknown_report(parts.tokenizer, looked_at(parts.train)) is None
    trainer, _ = train(
        tmp_path.with_name("few"), *source, "--train.steps", "1", "--text.vocab_captions", "3", flow=TEXT_FLOW
    )
    report = unknown_report(trainer.task.parts.tokenizer, looked_at(parts.train))
    # A run of an earlier version, which took the first captions, goes on with its tokens.
    assert list(first_places(parts.train, 15)) == list(range(15))
    assert trainer.task.state()["vocabulary"] == "spread"
    assert report.startswith("48 of 60 captions have words that are not among the 6 of the tokenizer, for example '")


def test_fp16_goes_on_from_fp16_alone(tmp_path):
    (tmp_path / "scaler.pt").touch()
    with_scale, without = SimpleNamespace(scaler=object()), SimpleNamespace(scaler=None)
    check_scaler(with_scale, tmp_path)
    check_scaler(without, tmp_path / "other")
    with pytest.raises(ValueError, match="was not trained with mixed_precision fp16"):
        check_scaler(with_scale, tmp_path / "other")


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "volume_preserving"])
def test_pixels(tmp_path, kind):
    flow = PIXEL_FLOW
    options = ["--vae.name", "none", "--data.image_size", "16", "--log.guidance_method", "linear"]
    options += ["--log.temperature", "0.8"]
    if kind == "uniform":
        flow = flow.replace("class_vectors", "none")
        options += ["--train.noise", "uniform"]
    if kind == "volume_preserving":
        flow = flow.replace('"exp"', '"additive", "learned_prior": true')
    _, early = train(tmp_path / "a", *options, "--train.steps", "1", flow=flow)
    trainer, late = train(tmp_path / "b", *options, "--train.steps", "30", flow=flow)
    name = "bits_per_dim" if kind == "uniform" else "pixel_nats_per_dim"
    assert late[name] < early[name] - 0.1
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "b" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.noise_std == (0.0 if kind == "uniform" else 0.3) and pipe.config.temperature == 0.8
    if kind == "uniform":
        images = pipe(num_images=2, guidance_scale=1.5, attention_temperature=1.2).images
    else:
        images = pipe(class_labels=["red circle", 3], guidance_scale=2.0, guidance_annealed=True).images
    assert [image.size for image in images] == [(16, 16)] * 2
    if kind == "volume_preserving":
        assert not torch.equal(pipe.flow.prior_variance, torch.ones_like(pipe.flow.prior_variance))
        assert torch.equal(pipe.flow.prior_variance, trainer.task.objective.flow.prior_variance.cpu())


def test_learned_denoiser_learns_the_score(tmp_path):
    flow = CLASS_FLOW[:-1] + ', "learned_denoiser": "conditional", "denoiser_layers": 1}'
    options = [
        "--optim.lr",
        "3e-4",
        "--optim.denoiser_lr",
        "3e-3",
        "--train.accumulation",
        "2",
    ]  # a flow that changes slowly
    trainer, _ = train(tmp_path / "run", *options, "--train.steps", "1", flow=flow)
    assert [group["peak_lr"] for group in trainer.task.learner.optimizer.param_groups] == [3e-4, 3e-3]
    trainer.total_steps = 1000
    batches = trainer.batches()
    for _ in range(60):
        values = trainer.train_step(batches)
    inputs = trainer.task.inputs.training(next(batches), trainer.step, range(8))
    latents, labels = inputs["latents"], inputs["class_labels"]
    score = (latents - score_denoise(trainer.task.objective.flow, latents, 0.3, class_labels=labels)) / 0.3
    with torch.no_grad():
        error = trainer.task.objective.flow.scaled_score(latents, class_labels=labels) - score
    assert error.pow(2).mean() < 0.6 * score.pow(2).mean()  # a new denoiser gives zeros
    assert float(values["denoiser_loss"]) == pytest.approx(float(error.pow(2).mean()), rel=0.5)

    # The target is the score that `score_denoise` uses.
    device = trainer.accelerator.device
    latents = torch.randn(3, 8, 4, 4, device=device, requires_grad=True)
    labels = torch.tensor([0, 1, 2], device=device)
    (4 * trainer.task.objective(latents, class_labels=labels)["loss"]).backward()
    target = score_target(latents.grad, noise_std=0.3, loss_scale=4)
    denoised = score_denoise(trainer.task.objective.flow, latents, 0.3, class_labels=labels)
    torch.testing.assert_close(latents.detach() - 0.3 * target, denoised)

    pipe = TARFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 4, 4)
    raw, score, learned = (
        pipe(class_labels=1, latents=noise, denoise=denoise, output_type="latent").images
        for denoise in (False, True, "learned")
    )
    torch.testing.assert_close(learned, learned_denoise(pipe.flow, raw, 0.3, class_labels=torch.tensor([1])))
    assert not torch.equal(score, learned)


def test_latent_norm_penalty(tmp_path):
    trainer, _ = train(tmp_path, "--train.steps", "2")
    device = trainer.accelerator.device
    latents, labels = torch.randn(3, 8, 4, 4, device=device), torch.tensor([0, 1, 2], device=device)
    with torch.no_grad():
        plain = trainer.task.objective(latents, class_labels=labels)["loss"]
        penalised = trainer.task.objective(latents, class_labels=labels, latent_norm_weight=0.5)["loss"]
        _, _, outputs = trainer.task.objective.flow(latents, labels, return_block_outputs=True)
    torch.testing.assert_close(penalised - plain, 0.5 * outputs[0].pow(2).mean())


def test_checkpoints_are_kept_and_checked(tmp_path, monkeypatch):
    options = ["--train.steps", "4", "--log.checkpoint_every", "1", "--log.keep_checkpoints", "2"]
    train(tmp_path, *options)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000004"]
    with pytest.raises(ValueError, match=r"another architecture: flow\.width is 64 there and 32 here"):
        train(tmp_path, *options, "--resume", "latest", flow=CLASS_FLOW.replace("64", "32"))
    with pytest.raises(ValueError, match="no checkpoint"):
        train(tmp_path / "other", *options, "--resume", "latest")
    assert not (tmp_path / "other").exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accelerate.Accelerator.save_state", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint.*No space left"):
        train(tmp_path / "full", *options)
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []


def test_max_minutes_follows_a_changing_speed(tmp_path, monkeypatch):
    now = [0.0]

    def slower_later(trainer, batches):
        trainer.stepper.seconds += 1.0
        now[0] += 1.0 if trainer.step < 100 else 3.0
        return {"loss": torch.zeros(())}

    monkeypatch.setattr("tarflow.training.loop.schedule.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "train_step", slower_later)
    _, metrics = train(tmp_path, "--train.max_minutes", "20", "--train.steps", "5000")
    assert metrics["steps"] == pytest.approx(100 + (20 * 60 - 100) / 3, rel=0.05)
    assert now[0] == pytest.approx(20 * 60, rel=0.05)


def test_non_finite_loss_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tarflow.training.flow.objective.flow_loss", lambda z, log_det, *_: (z * float("nan")).sum() + log_det.sum()
    )
    with pytest.raises(ValueError, match=r"not finite in 3 steps in a row; lower optim.lr"):
        train(tmp_path, "--train.steps", "9", "--train.max_bad_steps", "3")
    assert not (tmp_path / "pipeline").exists()


def test_unreadable_image_is_skipped_and_counted(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i in range(8):
            Image.new("RGB", (40, 32), (i * 30, 0, 0)).save(tmp_path / "image.png")
            archive.write(tmp_path / "image.png", f"a/{i}.png")
        archive.writestr("a/broken.png", b"not a picture")
    options = ["--data.source", "folder", "--data.path", str(tmp_path / "images.zip"), "--train.steps", "3"]
    options += ["--data.validation_fraction", "0"]
    with pytest.raises(ValueError, match=r"cannot read the image .*a/broken\.png"):
        train(tmp_path / "run", *options)
    trainer, _ = train(tmp_path / "run", *options, "--data.on_error", "skip")
    assert len(trainer.stepper.skipped) == 1
    assert "1 unreadable images were skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.max_minuts", "3"], "max_minuts"),
        (["--train.batch_size", "many"], "batch_size"),
        (["--train.noise_std", "-0.1"], r"train\.noise_std must be 0 or positive, got -0\.1"),
        (["--train.drop_rate", "1.5"], r"train\.drop_rate must be in \[0, 1\], got 1\.5"),
        (["--flow.widht", "64"], r"unknown key flow\.widht"),
        (["--flow.layers_per_block", "[]"], "layers_per_block must list at least one block"),
        (["--flow.head_dim", "48"], "head_dim 48 does not divide the width 64"),
        (["--flow.in_channels", "3"], r"flow\.in_channels is 3, but data and encoders give 8"),
        (["--data.source", "folder"], r"data\.path must name a folder"),
        (["--data.source", "folder", "--data.path", "/does/not/exist"], "does not exist"),
        (["--data.image_size", "36"], "must be a multiple of 8"),
        (["--vae.name", "/does/not/exist"], "cannot load the autoencoder '/does/not/exist'"),
        (["--text.kind", "small"], "captions need 'prefix'"),
        (["--train.noise", "uniform"], "'uniform', which is for pixels: set vae.name to none"),
        (["--flow.learned_denoiser", "both"], "learned_denoiser must be one of none, unconditional, conditional"),
        (["--flow.learned_denoiser", "conditional", "--train.noise_std", "0"], "learned_denoiser needs gaussian noise"),
    ],
)
def test_bad_settings(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path / "run", "--train.steps", "1", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_config_is_saved_and_reads_back(tmp_path):
    train(tmp_path, "--train.steps", "1", "--optim.lr", "3e-4")
    config, _ = parse_config(["--config", str(tmp_path / "config.yaml")])
    assert config.optim.lr == 3e-4
    assert config.train.steps == 1
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["noise_std"] == 0.3


def test_sampler_covers_every_epoch_on_any_number_of_processes():
    def positions(processes, accumulation, start, total):
        size = 12 // processes // accumulation
        ranks = [
            StepSampler([range(10)], size, rank, processes, accumulation, 3, start, total) for rank in range(processes)
        ]
        steps = [[[] for _ in range(accumulation)] for _ in range(total - start)]
        for number, parts in enumerate(zip(*ranks, strict=True)):
            steps[number // accumulation][number % accumulation] = [i for part in parts for i in part]
        return [[i for part in step for i in part] for step in steps]

    whole = positions(1, 1, 0, 10)
    assert whole == positions(2, 1, 0, 10) == positions(2, 3, 0, 10) == whole[:4] + positions(3, 2, 4, 10)
    flat = [i for batch in whole for i in batch]
    assert all(sorted(flat[i : i + 10]) == list(range(10)) for i in range(0, 120, 10))
    assert flat[:10] != flat[10:20]


def test_sampler_of_several_shapes():
    groups = [range(7), range(7, 18), range(18, 18), range(18, 21)]  # 2 + 3 + 1 batches of four
    steps = list(StepSampler(groups, 4, 0, 1, 1, 0, 0, 12))
    assert all(sum(set(batch) <= set(group) for group in groups) == 1 for batch in steps)
    for epoch in (steps[:6], steps[6:]):
        assert {i for batch in epoch for i in batch} == set(range(21))
    assert steps[:6] != steps[6:]
    halves = [list(StepSampler(groups, 2, rank, 2, 1, 0, 5, 12)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == steps[5:]


def test_fixed_batches_lie_evenly():
    class Shapes(list):
        groups = (range(10), range(10, 16))

    assert fixed_batches(Shapes(range(16)), 8, 3) == [[0, 2, 4], [6, 8], [10, 12, 14]]
    assert fixed_batches(range(2**40), 4, 3) == [[0, 1, 2], [3]]


def test_schedule():
    config = OptimConfig(min_lr_ratio=0.1)
    values = [schedule_factor(step, 14, 4, config) for step in range(15)]
    assert values[0] == 0.25
    assert values[3] == values[4] == 1.0
    assert values[9] == pytest.approx(0.55)
    assert values[14] == pytest.approx(0.1)
    assert schedule_factor(13, 14, 4, OptimConfig(schedule="constant")) == 1.0


@pytest.mark.parametrize("sampled", [True, False])
def test_latents_are_draws_or_means_of_the_posterior(tmp_path, sampled):
    options = ["--vae.sample_posterior", str(sampled).lower(), "--train.noise_std", "0", "--train.steps", "1"]
    trainer, _ = train(tmp_path, *options)
    parts = trainer.task.parts
    batch = collate([parts.train[i] for i in range(4)])
    latents = trainer.task.inputs.training(batch, 0, range(4))["latents"]
    means = parts.codec.encode(to_model(batch["image"].to(latents.device)))
    difference = (latents - means).std()
    assert 0.005 < difference < 0.2 if sampled else difference < 1e-6


def test_actnorms_are_set_by_latents_when_a_run_starts(tmp_path, monkeypatch):
    flow = CLASS_FLOW.replace('"class_prefix"', '"class_vectors", "block": "coupling", "mixing": "lu", "actnorm": true')
    calls, initialize = [], TARFlowModel.initialize_actnorm
    monkeypatch.setattr(
        TARFlowModel, "initialize_actnorm", lambda self, *rest: calls.append(len(rest[0])) or initialize(self, *rest)
    )
    options = ["--train.steps", "2", "--log.checkpoint_every", "1", "--optim.lr", "1e-9"]
    trainer, _ = train(tmp_path / "run", *options, flow=flow)
    assert calls == [256]
    batch = collate([trainer.task.parts.train[i] for i in range(64)])
    latents = trainer.task.inputs.training(batch, 0, range(64))["latents"]
    tokens, _ = trainer.task.objective.flow.patchify(latents)
    z, _ = trainer.task.objective.flow.blocks[0].actnorm(tokens)
    assert z.mean((0, 1)).abs().max() < 0.3
    assert (z.std((0, 1)) - 1).abs().max() < 0.3
    resume = ["--resume", str(tmp_path / "run" / "checkpoints" / "step_00000001")]
    train(tmp_path / "again", *options, *resume, flow=flow)
    train(tmp_path / "fine", *options, "--init_from", str(tmp_path / "run" / "pipeline"), flow="{}")
    assert calls == [256]  # weights that come from elsewhere stay
    assert all(torch.equal(value, weights(tmp_path / "again")[key]) for key, value in weights(tmp_path / "run").items())

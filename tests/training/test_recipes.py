"""Ways to train: from a cache, in several shapes, from a pipeline, at another size, by pictures, with spikes left out."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image
from pipelines import make_pipeline
from safetensors.torch import save_file
from trainings import TEXT_FLOW, train, weights

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.data.config import DataConfig
from tarflow.training.flow import setup
from tarflow.training.flow.assembly import open_metric
from tarflow.training.flow.config import TextConfig, VaeConfig
from tarflow.training.flow.start import Start
from tarflow.training.latent_cache.caching import cache_latents
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.training.loop.config import OptimConfig
from tarflow.training.loop.schedule import TimeLimit, peak_factor
from tarflow.training.loop.trainer import Trainer
from tarflow.vae.codec import load_autoencoder

COUNT = 40


def loss_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list that gets the loss of each step from now on."""
    losses, train_step = [], Trainer.train_step

    def recorded(self, batches):
        values = train_step(self, batches)
        losses.append(float(values["loss"]))
        return values

    monkeypatch.setattr(Trainer, "train_step", recorded)
    return losses


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty-eight pictures in two classes, all twice as wide as they are high, or square."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT + 8):
        path = folder / ("train" if i < COUNT else "val") / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (64, 32) if i % 3 == 0 else (32, 32)
        picture = Image.new("RGB", size, (i * 5, 255 - i * 5, 90))
        picture.paste((200, 0, i * 5), (0, 0, 8 + i % 7, 20))
        picture.save(path)
    return folder


def test_training_from_a_cache_is_the_same(tmp_path, pictures, monkeypatch):
    data = DataConfig(source="folder", path=str(pictures), image_size=32)
    cache_latents(CacheConfig(output=str(tmp_path / "cache"), data=data, flip=True, dtype="float32", shard_size=16))
    losses = loss_of_steps(monkeypatch)
    options = ["--train.steps", "5", "--data.flip", "true", "--vae.measure_images", "1000"]
    live = ["--data.source", "folder", "--data.path", str(pictures)]
    train(tmp_path / "live", *options, *live)
    loaded, load = [], setup.load_autoencoder
    monkeypatch.setattr(setup, "load_autoencoder", lambda *name: loaded.append(len(losses)) or load(*name))
    trainer, metrics = train(
        tmp_path / "cached", *options, "--data.source", "latents", "--data.path", str(tmp_path / "cache")
    )
    assert losses[:5] == pytest.approx(losses[5:], abs=1e-5)
    assert loaded == [10]  # for the pipeline, after the last step
    assert "latent_nats_per_dim" in metrics
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "cached" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels="class1").images[0].size == (32, 32)
    assert trainer.stepper.waited > 0

    for arguments, message in (
        (["--vae.name", "other"], "vae.name is 'other', but the latents were cached with 'drawings_emoji_f8c8'"),
        (["--data.image_size", "48"], "data.image_size is 48, but the latents are of pictures of 32"),
        (["--vae.name", "none"], "vae.name is none, which models pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "bad", "--data.source", "latents", "--data.path", str(tmp_path / "cache"), *arguments)
    shard = min((tmp_path / "cache").glob("train-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.name}' is corrupt"):
        train(tmp_path / "bad", "--data.source", "latents", "--data.path", str(tmp_path / "cache"))
    assert not (tmp_path / "bad").exists()


def test_batches_of_one_shape(tmp_path, pictures, monkeypatch):
    data = DataConfig(source="folder", path=str(pictures), image_size=32)
    config = CacheConfig(output=str(tmp_path / "cache"), data=data, aspect_ratios=["1:1", "2:1"])
    shapes = {tuple(shard["shape"]) for shard in cache_latents(config)["shards"]}
    assert len(shapes) == 2
    seen, forward = set(), TARFlowModel.forward
    monkeypatch.setattr(
        TARFlowModel,
        "forward",
        lambda self, x, *rest, **more: seen.add(tuple(x.shape[-2:])) or forward(self, x, *rest, **more),
    )
    options = ["--data.source", "latents", "--data.path", str(tmp_path / "cache")]
    _, early = train(tmp_path / "early", *options, "--train.steps", "1")
    _, late = train(tmp_path / "late", *options, "--train.steps", "30", "--log.eval_images", "8")
    assert seen == shapes
    assert late["latent_nats_per_dim"] < early["latent_nats_per_dim"]


def test_start_from_a_pipeline(tmp_path, monkeypatch, capsys):
    text = ["--text.kind", "small", "--text.width", "16", "--text.layers", "1"]
    train(tmp_path / "first", *text, "--train.steps", "40", flow=TEXT_FLOW)
    losses = loss_of_steps(monkeypatch)
    pipeline = str(tmp_path / "first" / "pipeline")
    options = [*text, "--train.steps", "6", "--init_from", pipeline, "--log.checkpoint_every", "3"]
    fine, _ = train(tmp_path / "fine", *options, flow="{}")
    train(tmp_path / "anew", *text, "--train.steps", "1", flow=TEXT_FLOW)
    assert losses[0] < losses[6] - 0.1  # it starts where the first run ended
    assert fine.task.parts.codec.latents_mean == TARFlowPipeline.from_pretrained(pipeline).config.latents_mean
    resume = ["--resume", str(tmp_path / "fine" / "checkpoints" / "step_00000003")]
    train(tmp_path / "again", *options, *resume, flow="{}")
    assert all(
        torch.equal(value, weights(tmp_path / "again")[key]) for key, value in weights(tmp_path / "fine").items()
    )

    losses.clear()
    assert "(text.max_length)" not in "".join(capsys.readouterr())
    train(tmp_path / "larger", *options, "--data.image_size", "64", "--text.max_length", "12", flow="{}")
    assert "captions are cut after 12 tokens (text.max_length), the pipeline" in "".join(capsys.readouterr())
    train(tmp_path / "larger_anew", *text, "--data.image_size", "64", "--train.steps", "1", flow=TEXT_FLOW)
    assert losses[0] < losses[6] - 0.1
    larger = TARFlowPipeline.from_pretrained(tmp_path / "larger" / "pipeline")
    larger.set_progress_bar_config(disable=True)
    assert (larger.flow.config.sample_size, larger.flow.config.position_length) == (8, 4)
    assert larger("a small red circle on a dark background").images[0].size == (64, 64)

    for arguments, flow, message in (
        ([], TEXT_FLOW.replace("64", "128"), "flow.width is 128, but the pipeline .* has 64"),
        (
            ["--vae.measure_images", "0", "--init_from", str(tmp_path)],
            "{}",
            "cannot start from .* is no folder of a pipeline",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "bad", *options, *arguments, flow=flow)


def test_pictures_instead_of_steps(tmp_path):
    options = ["--train.images", "50", "--optim.warmup_images", "30", "--optim.lr_scaling", "linear"]
    trainer, metrics = train(tmp_path, *options, "--optim.reference_batch", "4", "--train.accumulation", "2")
    assert metrics["steps"] == 4  # of sixteen pictures
    trainer.stepper.set_learning_rates(trainer.task.learners(0), 0, 4)
    assert trainer.task.learner.optimizer.param_groups[0]["lr"] == pytest.approx(
        1e-3 * 4 / 2
    )  # the first of two warm-up steps
    assert peak_factor(OptimConfig(lr_scaling="sqrt", reference_batch=4), 16) == 2
    assert peak_factor(OptimConfig(), 16) == 1


def test_spikes_are_left_out_and_counted(tmp_path, capsys):
    trainer, _ = train(tmp_path / "a", "--train.steps", "3", "--optim.skip_grad_norm", "1e-6")
    assert trainer.stepper.spikes == 3
    assert "3 steps with a gradient norm above 1e-06 were left out" in capsys.readouterr().out
    untouched = weights(tmp_path / "a")
    assert all(not value.any() for key, value in untouched.items() if "proj_out" in key)
    trainer, _ = train(tmp_path / "b", "--train.steps", "3", "--optim.skip_grad_norm", "1e6")
    assert trainer.stepper.spikes == 0


def test_settings_of_the_optimizer_change_at_a_resume(tmp_path):
    options = ["--train.steps", "4", "--log.checkpoint_every", "2", "--train.batch_size", "4"]
    train(tmp_path, *options, "--train.steps", "2")
    trainer, _ = train(tmp_path, *options, "--resume", "latest", "--optim.lr", "1e-5", "--optim.weight_decay", "0.5")
    (group,) = trainer.task.learner.optimizer.param_groups
    assert (group["peak_lr"], group["weight_decay"]) == (1e-5, 0.5)
    with pytest.raises(ValueError, match=r"trained with 4 pictures a step, not 8: set train\.batch_size"):
        train(tmp_path, *options, "--resume", "latest", "--train.accumulation", "2")
    with pytest.raises(ValueError, match="newer than step_00000002, up to step_00000004"):
        train(tmp_path, *options, "--resume", str(tmp_path / "checkpoints" / "step_00000002"))


@pytest.mark.parametrize(
    ("minutes", "first", "step", "steps"),
    [
        (20, 1, 1.0, 1200),
        (20, 240, 1.0, 960),  # a compiled first step
        (1, 15, 15.0, 4),  # slow from the first step on
        (1, 1, 4.0, 15),
        (0.1, 30, 30.0, 1),  # not even one step fits
    ],
)
def test_processes_agree_on_the_time_left(monkeypatch, minutes, first, step, steps):
    clocks = [random.Random(rank) for rank in range(2)]
    now = [0.0, 0.0]
    rank = [0]
    monkeypatch.setattr("tarflow.training.loop.schedule.time.perf_counter", lambda: now[rank[0]])
    limits = [TimeLimit(minutes) for _ in range(2)]
    total, done = 100_000, 0
    while done < total:
        seconds, done = step if done else first, done + 1
        now = [time + seconds * (1 + clock.uniform(-0.05, 0.05)) for time, clock in zip(now, clocks, strict=True)]
        assert limits[0].is_due(done) == limits[1].is_due(done)
        if limits[0].is_due(done):
            lefts = []
            for rank[0], limit in enumerate(limits):
                lefts.append(limit.steps_left(done, 100_000 - done))
            for limit in limits:  # the main process's clock decides
                limit.agree(done, lefts[0])
            total = total if lefts[0] is None else done + lefts[0]
    assert total == pytest.approx(steps, rel=0.02, abs=1)
    assert now[0] < 60 * minutes + 1.1 * max(step, first if steps == 1 else 0)


@pytest.mark.parametrize("options", [["--train.compile", "true"], ["--train.checkpointing", "both"]])
def test_the_same_losses_with_less_time_or_memory(tmp_path, monkeypatch, options):
    eager = partial(torch.nn.Module.compile, backend="eager")  # the real one takes half a minute
    monkeypatch.setattr(
        "tarflow.flows.layers.transformer.TransformerLayer.compile",
        lambda self, **more: eager(self, **more),
        raising=False,
    )
    losses = loss_of_steps(monkeypatch)
    train(tmp_path / "plain", "--train.steps", "4")
    train(tmp_path / "other", "--train.steps", "4", *options)
    assert losses[:4] == pytest.approx(losses[4:], abs=1e-5)
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "other" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=0).images[0].size == (32, 32)


def test_a_distance_at_intervals(tmp_path, monkeypatch, pictures):
    torch.manual_seed(0)
    weights_file = tmp_path / "shufflenet.safetensors"
    save_file(torchvision.models.shufflenet_v2_x0_5().state_dict(), weights_file)
    logged = {}
    monkeypatch.setattr(
        "accelerate.Accelerator.log", lambda self, values, step: logged.setdefault(step, {}).update(values)
    )
    data = ["--data.source", "folder", "--data.path", str(pictures), "--train.steps", "4"]
    metric = ["--metric.every", "2", "--metric.images", "8", "--metric.extractor", "shufflenet_v2_x0_5"]
    _, metrics = train(tmp_path / "run", *data, *metric, "--metric.weights", str(weights_file))
    name = "frechet_distance_shufflenet_v2_x0_5"
    assert metrics[name] > 0
    assert logged[4][f"samples/{name}"] == metrics[name]
    assert logged[2][f"samples/{name}"] != metrics[name]
    with pytest.raises(ValueError, match=r"nothing is held out: raise data\.validation_fraction"):
        options = ["--data.source", "folder", "--data.path", str(pictures / "train"), "--data.validation_fraction", "0"]
        train(tmp_path / "bad", *options, *metric, "--metric.weights", str(weights_file))
    with pytest.raises(ValueError, match=r"only 1 picture is held out: raise data\.validation_fraction"):
        one = tmp_path / "one"
        shutil.copytree(pictures / "train", one / "train")
        held_out = next(path for path in (pictures / "train").rglob("*.png"))
        (one / "validation" / held_out.parent.name).mkdir(parents=True)
        shutil.copy(held_out, one / "validation" / held_out.parent.name)
        options = ["--data.source", "folder", "--data.path", str(one)]
        train(tmp_path / "bad", *options, *metric, "--metric.weights", str(weights_file))
    with pytest.raises(ValueError, match="for pictures of one shape, but those held out have 2"):
        shapes = SimpleNamespace(validation=SeveralShapes())
        open_metric(SimpleNamespace(metric=SimpleNamespace(every=1)), shapes, SimpleNamespace(is_main_process=True))


class SeveralShapes:
    """As held-out pictures of two shapes."""

    groups = (range(3), range(3, 5))

    def __len__(self):
        return 5


def test_what_differs_from_the_pipeline_to_start_from_is_said() -> None:
    classes, captions = Start(make_pipeline("class_prefix"), "base"), Start(make_pipeline("prefix"), "base")
    none, small = TextConfig(), TextConfig(kind="small", max_length=8)
    assert classes.differences(none, ("Tench", "church", "gas pump")) == captions.differences(small, None) == []
    assert classes.differences(none, ("Tench", "kite", "gas pump")) == [
        "classes that the pipeline 'base' does not know: 'kite' begins as 'church'"
    ]
    with pytest.raises(
        ValueError, match=r"'church' has the number 0 in the data and 1 in .*, so it would begin as 'Tench'"
    ):
        classes.differences(none, ("church", "Tench", "gas pump"))
    assert captions.differences(TextConfig(kind="small", max_length=5), None) == [
        "captions are cut after 5 tokens (text.max_length), the pipeline 'base' was trained with 8"
    ]


def test_all_that_a_run_has_otherwise_than_the_pipeline_is_said_at_once() -> None:
    start = Start(make_pipeline("prefix"), "my base")
    given = {"qk_norm": True, "conditioning": "prefix", "layers_per_block": [1, 9]}
    own = start.pipeline.flow.config
    with pytest.raises(ValueError) as refused:
        start.flow_settings(given, VaeConfig(name="taef2"))
    layers = list(own.layers_per_block)
    assert str(refused.value) == (
        f"flow.qk_norm is true, flow.layers_per_block is [1, 9], but the pipeline 'my base' has false, {layers}: give "
        f"--flow.qk_norm false --flow.layers_per_block '{layers}', or --flow '{{}}' for its flow as it is; its autoencoder is "
        "another than vae.name too: give --vae.name drawings_emoji_f8c8"
    )
    with pytest.raises(ValueError, match=r"for its flow as it is$"):
        start.flow_settings(given)
    with pytest.raises(
        ValueError, match=r"^flow\.kind is trajectory, .* has flow, .*: give --flow '\{\}' for its flow as it is$"
    ):
        start.flow_settings(
            {"kind": "trajectory", "steps": [4], "layers_per_block": [1, 9]}
        )  # flow.steps is not of a flow
    assert start.flow_settings({"layers_per_block": layers}) == start.flow_settings({})


def test_an_autoencoder_that_ships_is_named() -> None:
    start = Start(make_pipeline("prefix"), "my base")
    start.pipeline.register_modules(vae=load_autoencoder("taef2"))
    assert start.vae_options() == "--vae.name taef2" and not start.vae_differs(VaeConfig(name="taef2"))
    assert start.vae_differs(VaeConfig(name="none"))
    with pytest.raises(ValueError, match=r"give --vae\.name taef2, and of cached latents those of that autoencoder"):
        start.check_autoencoder("another hash")
    next(start.pipeline.vae.parameters()).data += 1
    assert start.vae_options() == "--vae.name 'my base' --vae.subfolder vae"
    start.pipeline.register_modules(vae=None)
    assert start.vae_options() == "--vae.name none" and start.vae_differs(VaeConfig(name="taef2"))

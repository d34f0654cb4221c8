"""Training autoencoders: the loss falls, resuming is bit-identical, posteriors, statistics, bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from autoencoders import MODEL, SETTINGS, arguments, train, trainer
from diffusers import AutoencoderKL
from helpers import ROOT, files_of
from parallel_runs import launched
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tarflow.common.arguments import parse_dataclass
from tarflow.training.autoencoder.config import TrainVaeConfig
from tarflow.training.autoencoder.model import (
    Reconstruction,
    check_arguments,
    copy_for_use,
    fix_posterior,
    kl_divergence,
)
from tarflow.training.autoencoder.report import evaluate
from tarflow.training.loop.network_task import write_metrics
from tarflow.training.loop.step import Stepper

on_cpu = pytest.mark.skipif(
    os.environ.get("TARFLOW_TEST_DEVICE", "cpu") != "cpu", reason="the same bits are promised on a CPU only"
)
ADVERSARIAL = [
    *("--loss.adversarial", "0.5", "--loss.adversarial_start", "2"),
    *("--loss.discriminator_width", "8", "--loss.discriminator_layers", "2"),
]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    """Bit for bit the same autoencoder, discriminator, optimizers and averages."""
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name
    ends = [max(folder.with_name(f"{folder.name}_run").glob("checkpoints/*")) for folder in (first, second)]
    assert ends[0].name == ends[1].name
    for name in ("model.safetensors", "model_1.safetensors"):
        one, other = (load_file(end / name) for end in ends)
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    for name in ("optimizer.bin", "optimizer_1.bin"):
        one, other = (torch.load(end / name, weights_only=True)["state"] for end in ends)
        assert all(torch.equal(one[place][key], other[place][key]) for place in one for key in one[place])


class TestTraining:
    def test_loss_falls_and_folder_is_diffusers_own(self, tmp_path: Path) -> None:
        early = train(tmp_path / "a", "--steps", "1")
        late = train(tmp_path / "b", "--steps", "40", "--eval_every", "30", "--card", "About it.", "--dtype", "float16")
        assert late["psnr_drawings"] > early["psnr_drawings"] + 2
        lines = [json.loads(line) for line in (tmp_path / "b_run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [30, 40]
        assert {**lines[-1], "steps": 40} == late
        assert sorted(path.name for path in (tmp_path / "b_run" / "grids").iterdir()) == [
            "drawings_00000030.png",
            "drawings_00000040.png",
        ]
        assert (tmp_path / "b" / "README.md").read_text() == "About it."
        vae = AutoencoderKL.from_pretrained(tmp_path / "b", torch_dtype=torch.float16)
        assert vae.decode(vae.encode(torch.zeros(1, 3, 32, 32).half()).latent_dist.mode()).sample.shape[-1] == 32
        assert not (tmp_path / "b_run" / "checkpoints").exists()

    @on_cpu
    def test_resume_after_sigterm_is_bit_identical(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = [*ADVERSARIAL, "--steps", "7", "--checkpoint_every", "3", "--accumulation", "2"]
        train(tmp_path / "whole", *settings)
        take = Stepper.take

        def signalled(self: Stepper, batches: Any, step: int, total: int) -> dict[str, Tensor]:
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(self, batches, step, total)

        monkeypatch.setattr(Stepper, "take", signalled)
        assert train(tmp_path / "parts", *settings) == {"steps": 5, "stopped": "SIGTERM"}
        monkeypatch.undo()
        assert not (tmp_path / "parts").exists()
        assert train(tmp_path / "parts", *settings, "--resume", "latest")["step"] == 7
        assert_same_run(tmp_path / "whole", tmp_path / "parts")
        step_6 = str(tmp_path / "whole_run" / "checkpoints" / "step_00000006")
        train(tmp_path / "other", *settings, "--resume", step_6)
        assert_same_run(tmp_path / "whole", tmp_path / "other")
        with pytest.raises(ValueError, match=r"differs: model.latent_channels is 2 there and 4 here"):
            train(tmp_path / "other", *settings, "--resume", "latest", latent_channels=4)
        with pytest.raises(ValueError, match="has checkpoints of an earlier run, up to step_00000007"):
            train(tmp_path / "whole", *settings)

    @on_cpu
    def test_checkpoints_from_before_rates_and_spikes_were_kept_go_on(self, tmp_path: Path) -> None:
        settings = [*ADVERSARIAL, "--steps", "4", "--checkpoint_every", "2"]
        train(tmp_path / "whole", *settings)
        step_2 = tmp_path / "whole_run" / "checkpoints" / "step_00000002"
        old = shutil.copytree(step_2, tmp_path / "elsewhere" / "step_00000002")
        state = json.loads((old / "run.json").read_text())
        del state["spikes"]
        (old / "run.json").write_text(json.dumps(state))
        optimizer = torch.load(old / "optimizer.bin", weights_only=True)
        del optimizer["param_groups"][0]["peak_lr"]
        torch.save(optimizer, old / "optimizer.bin")
        train(tmp_path / "other", *settings, "--resume", str(old))
        assert_same_run(tmp_path / "whole", tmp_path / "other")

    def test_discriminator_starts_late(self, tmp_path: Path) -> None:
        for name, steps in (("before", "2"), ("after", "3")):
            train(tmp_path / name, *ADVERSARIAL, "--steps", steps)
            train(tmp_path / f"{name}_without", "--steps", steps)
        same = {
            name: all(
                torch.equal(value, weights(tmp_path / f"{name}_without")[key])
                for key, value in weights(tmp_path / name).items()
            )
            for name in ("before", "after")
        }
        assert same == {"before": True, "after": False}

    def test_starts_from_a_saved_one(self, tmp_path: Path) -> None:
        train(tmp_path / "first", "--steps", "2")
        start = ["--init_from", str(tmp_path / "first"), "--steps", "1"]
        trained = trainer([*SETTINGS, *start, "--output", str(tmp_path / "second")])
        for name, value in trained.task.network.vae.state_dict().items():
            assert torch.equal(value, weights(tmp_path / "first")[name])
        assert trained.run()["step"] == 1
        assert any(not torch.equal(v, weights(tmp_path / "first")[k]) for k, v in weights(tmp_path / "second").items())
        assert trainer(arguments(tmp_path / "third", *start, sample_size=16)).task.latent_shape == (2, 8, 8)
        with pytest.raises(ValueError, match=r"model.latent_channels is 4, but the autoencoder .* has 2"):
            trainer(arguments(tmp_path / "fourth", *start, latent_channels=4))
        assert not list(tmp_path.glob("fourth*"))

    def test_perceptual_loss_and_time_limit(self, tmp_path: Path) -> None:
        save_file(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "x.safetensors")
        settings = ["--loss.perceptual", "1", "--loss.perceptual_weights", str(tmp_path / "x.safetensors")]
        metrics = train(tmp_path / "a", *settings, "--max_minutes", "1e-4", "--mixed_precision", "bf16")
        assert metrics["step"] == 1

    @on_cpu
    def test_two_processes_train_like_one(self, tmp_path: Path) -> None:
        # An adaptive weight would be each process's own.
        settings = [*ADVERSARIAL, "--loss.adaptive", "false", "--loss.adversarial_start", "0", "--steps", "3"]
        train(tmp_path / "one", *settings, "--accumulation", "2", "--checkpoint_every", "3")
        launched("ddp", 2, "scripts/train_vae.py", arguments(tmp_path / "two", *settings, "--checkpoint_every", "3"))
        for name, value in weights(tmp_path / "one").items():
            torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=0, atol=1e-5, msg=name)
        one, two = (
            load_file(tmp_path / f"{name}_run" / "checkpoints" / "step_00000003" / "model_1.safetensors")
            for name in ("one", "two")
        )
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("vae_*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs(path: Path) -> None:
    config, _ = parse_dataclass(TrainVaeConfig, ["--config", str(path)])
    check_arguments(config.model, config.image_size)
    with torch.device("meta"):
        vae = AutoencoderKL(**config.model)
    millions = sum(parameter.numel() for parameter in vae.parameters()) / 1e6
    if "million parameters" in (first := path.read_text().splitlines()[0]):
        assert f"{millions:.1f} million parameters" in first


class TestPosterior:
    def test_kl_is_that_of_the_distributions(self) -> None:
        mean, log_variance = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        own = torch.distributions.Normal(mean, (log_variance / 2).exp())
        expected = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0)).mean()
        torch.testing.assert_close(kl_divergence(mean, log_variance), expected)

    @pytest.mark.parametrize("std", [None, 0.4])
    def test_latents_are_means_and_noise(self, std: float | None) -> None:
        vae, images = AutoencoderKL(**MODEL), torch.rand(2, 3, 32, 32) * 2 - 1
        noise = torch.randn(2, 2, 8, 8)
        mean, log_variance, decoded = Reconstruction(vae, std)(images, noise)
        posterior = vae.encode(images).latent_dist
        sigma = posterior.std if std is None else torch.full_like(posterior.std, std)
        torch.testing.assert_close(mean, posterior.mean)
        torch.testing.assert_close((log_variance / 2).exp(), sigma)
        torch.testing.assert_close(decoded, vae.decode(posterior.mean + sigma * noise).sample)

    @pytest.mark.parametrize("quant_conv", [False, True])
    def test_constant_one_is_saved_with_its_std(self, tmp_path: Path, quant_conv: bool) -> None:
        settings = ["--posterior", "constant", "--posterior_std", "0.3", "--dtype", "float16", "--steps", "2"]
        metrics = train(tmp_path / "a", *settings, use_quant_conv=quant_conv)
        assert metrics["posterior_std_drawings"] == pytest.approx(0.3, rel=1e-5)
        vae = AutoencoderKL.from_pretrained(tmp_path / "a")
        posterior = vae.encode(torch.rand(2, 3, 32, 32) * 2 - 1).latent_dist
        torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, 0.3), rtol=1e-3, atol=0)
        assert posterior.mean.std() > 0

    def test_fixing_leaves_the_means(self) -> None:
        vae, images = AutoencoderKL(**MODEL), torch.rand(2, 3, 32, 32)
        fixed = copy_for_use(vae, 0.3)
        torch.testing.assert_close(fixed.encode(images).latent_dist.mean, vae.encode(images).latent_dist.mean)
        assert vae.encode(images).latent_dist.std.std() > 0  # the one in training is not touched
        fix_posterior(vae, 0.3)
        for name, value in vae.state_dict().items():
            assert torch.equal(value, fixed.state_dict()[name])


class Repeating(nn.Module):
    """Stands for an autoencoder of factor 1 without loss; its second channel is nearly dead, its third is."""

    device = torch.device("cpu")

    def encode(self, images: Tensor) -> Any:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        mean = images * torch.tensor([1.0, 0.2, 0.05]).view(1, 3, 1, 1)
        posterior = DiagonalGaussianDistribution(torch.cat([mean, torch.zeros_like(mean)], 1))
        return type("Output", (), {"latent_dist": posterior})

    def decode(self, latents: Tensor) -> Any:
        return type("Output", (), {"sample": latents / torch.tensor([1.0, 0.2, 0.05]).view(1, 3, 1, 1)})


def test_statistics_and_noise() -> None:
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    metrics, rows = evaluate(Repeating(), images, 4, 0.1, 0)
    pixels = images.double() / 127.5 - 1
    std = pixels.std((0, 2, 3), correction=0) * torch.tensor([1.0, 0.2, 0.05], dtype=torch.float64)
    assert metrics["latents_std"] == pytest.approx(std.tolist(), rel=1e-4)
    assert metrics["latents_mean"][0] == pytest.approx(float(pixels[:, 0].mean()), abs=1e-5)
    assert (metrics["posterior_std"], metrics["dead_channels"]) == (pytest.approx(1), pytest.approx(1 / 3))
    assert metrics["psnr"] == pytest.approx(68.13, abs=0.01)
    assert metrics["ssim"] == pytest.approx(1)
    # Noise of a tenth of the channels' deviation, about 74 of 256, less what is cut off at black and white.
    assert 20 * math.log10(255 / 7.4) < metrics["noisy_psnr"] < 20 * math.log10(255 / 6)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    again, _ = evaluate(Repeating(), images, 4, 0.1, 0)
    assert again == metrics


def test_metrics_of_an_interrupted_run_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 4.0)):
        write_metrics(path, {"step": step, "value": value})
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [1.0, 4.0]


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        (
            [],
            {"block_out_channels": [8, 8]},
            "model.down_block_types has 3 entries, but model.block_out_channels has 2",
        ),
        ([], {"norm_num_groups": 3}, r"model.norm_num_groups \(3\) must divide all of model.block_out_channels"),
        ([], {"down_block_types": ["NoBlock"] * 3}, "these model arguments make no AutoencoderKL: NoBlock"),
        ([], {"widths": [8]}, "unknown key model.widths; the model section has in_channels"),
        ([], {"in_channels": 1}, "model.in_channels must be 3"),
        ([], {"latent_channels": 0}, "model.latent_channels must be at least 1"),
        (["--sources.drawings.data.image_size", "34"], {}, "must be a multiple of 4, the factor of 3 blocks, got 34"),
        (["--loss.perceptual", "1", "--loss.perceptual_weights", "none.pth"], {}, "there is no file of weights"),
        (["--loss.perceptual", "1", "--loss.perceptual_network", "lpips"], {}, "needs the package lpips"),
        (["--loss.adversarial", "1", "--loss.discriminator_layers", "4"], {}, "32 pixels are too small"),
        (["--loss.adversarial", "1", "--mixed_precision", "fp16"], {}, "cannot be trained with mixed_precision fp16"),
        (["--posterior_std", "0"], {}, "posterior_std must be positive"),
        (["--posterior", "uniform"], {}, "posterior"),
        (["--resume", "latest"], {}, "there is no checkpoint in"),
        (["--init_from", "no_folder"], {}, "cannot load the autoencoder 'no_folder'"),
        (["--max_minutes", "-1"], {}, "max_minutes must be positive"),
        (["--sources", "{}"], {}, "sources is empty"),
        (["--no_such_key", "1"], {}, "no_such_key"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    settings: list[str],
    model: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "lpips" in settings:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message) as raised:
        train(tmp_path / "a", "--steps", "1", *settings, **model)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_folder_is_not_replaced(tmp_path: Path) -> None:
    train(tmp_path / "a", "--steps", "1")
    before = files_of(tmp_path / "a")
    with pytest.raises(ValueError, match=r"'.*a' has an autoencoder already \(config\.json\), .*: give another output"):
        train(tmp_path / "a", "--steps", "1", "--init_from", str(tmp_path / "a"))
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has a pipeline already \(model_index\.json\)"):
        train(tmp_path / "pipe", "--steps", "1")
    assert files_of(tmp_path / "a") == before
    assert [path.name for path in (tmp_path / "pipe").iterdir()] == ["model_index.json"]


def test_another_posterior_is_another_run(tmp_path: Path) -> None:
    train(tmp_path / "a", "--steps", "1", "--posterior", "constant", "--checkpoint_every", "1")
    on = ["--steps", "2", "--checkpoint_every", "1", "--resume", "latest"]
    with pytest.raises(ValueError, match="differs: posterior is constant there and gaussian here"):
        train(tmp_path / "a", *on, "--posterior", "gaussian")
    with pytest.raises(ValueError, match=r"differs: posterior_std is 0\.5 there and 0\.7 here"):
        train(tmp_path / "a", *on, "--posterior", "constant", "--posterior_std", "0.7")
    file = tmp_path / "a_run" / "checkpoints" / "step_00000001" / "run.json"
    state = json.loads(file.read_text())  # as it was written before the posterior was kept
    state["facts"] = {key: value for key, value in state["facts"].items() if not key.startswith("posterior")}
    file.write_text(json.dumps(state))
    assert train(tmp_path / "a", *on, "--posterior", "constant")["steps"] == 2


def test_script_fails_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tarflow.cli.train_vae import main

    with pytest.raises(SystemExit, match="2"):
        main(arguments(tmp_path / "a", "--steps", "0"))
    assert "error: " in capsys.readouterr().err

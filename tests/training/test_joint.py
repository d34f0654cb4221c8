"""Training the autoencoder along: the loss, its gradients, what keeps latents from shrinking, resuming, the pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from helpers import ROOT, small_model
from safetensors.torch import load_file
from trainings import CLASS_FLOW, train

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.common.arguments import parse_dataclass
from tarflow.data.config import DataConfig
from tarflow.flows.likelihood import log_prob
from tarflow.training.flow.accelerator import check_parallel
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.config import VaeConfig
from tarflow.training.flow.joint import JointObjective, renormalise
from tarflow.training.flow.joint_config import JointConfig
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.training.loop.component import check_posterior, noisy_latents
from tarflow.training.loop.step import Stepper
from tarflow.training.student.config import StudentConfig
from tarflow.vae.codec import LatentCodec

#: Pictures of 16 pixels to latents of 4 × 4.
MODEL = {
    "latent_channels": 2,
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "scaling_factor": 0.5,
}
NEW = ["--vae.train", "joint", "--train.noise_std", "0", "--data.image_size", "16", "--vae.name", "new"]
NEW += ["--joint.model", json.dumps(MODEL), "--joint.lr", "3e-3"]
MEAN, STD = [0.1, -0.2], [0.3, 0.4]


def objective(**settings: Any) -> JointObjective:
    """A small one whose statistics are not those of its means."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**MODEL)
    return JointObjective(
        small_model(conditioning="class_prefix"), None, LatentCodec(vae, MEAN, STD), JointConfig(**settings)
    ).eval()


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(3, size, side, side, generator=generator) for size, side in ((3, 16), (2, 4)))
    return {"images": images.clamp(-1, 1), "noise": noise, "class_labels": torch.tensor([0, 1, 2])}


@pytest.mark.parametrize("renormalised", [True, False])
def test_the_loss_is_that_of_the_latents_that_are_decoded(renormalised: bool) -> None:
    joint, batch = objective(renormalise=renormalised, posterior_std=0.7), inputs()
    output = joint(**batch)
    means = 0.5 * joint.vae.encode(batch["images"]).latent_dist.mean
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
    latents = (means - mean) / std + 0.7 * batch["noise"]
    nats = -log_prob(joint.flow, latents, batch["class_labels"]) / latents[0].numel()
    torch.testing.assert_close(output["nats_per_dim"], nats, rtol=1e-4, atol=1e-5)
    decoded = joint.vae.decode((latents * std + mean) / 0.5).sample
    torch.testing.assert_close(output["decoded"], decoded, rtol=1e-4, atol=1e-4)
    given = joint(latents, class_labels=batch["class_labels"])
    torch.testing.assert_close(given["loss"], output["loss"], rtol=1e-4, atol=1e-5)
    found = torch.stack([means.mean((0, 2, 3)), means.square().mean((0, 2, 3))])
    torch.testing.assert_close(output["moments"], found)
    before = joint.moments.clone()
    joint.update_statistics(found)
    torch.testing.assert_close(joint.moments, before + 0.05 * (found - before) if renormalised else before)


def test_gradients() -> None:
    def of_likelihood(weight: float) -> dict[str, torch.Tensor | None]:
        joint = objective(nll_weight=weight)
        joint(**inputs())["loss"].backward()
        return {name: parameter.grad for name, parameter in joint.named_parameters()}

    whole, part, none = of_likelihood(1), of_likelihood(0.25), of_likelihood(0)
    encoder = [name for name in whole if name.startswith("vae.encoder")]
    flow = [name for name in whole if name.startswith("flow.")]
    for name in encoder:
        torch.testing.assert_close(part[name], 0.25 * whole[name], rtol=1e-4, atol=1e-7)
        assert none[name] is None
    assert any(whole[name].abs().max() > 1e-4 for name in encoder)
    for name in flow:
        torch.testing.assert_close(part[name], whole[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(none[name], whole[name], rtol=1e-5, atol=1e-7)

    joint, batch = objective(), inputs()
    output = joint(**batch)
    (output["loss"] + (output["decoded"] - batch["images"]).square().mean()).backward()
    assert all(parameter.grad is not None for parameter in joint.parameters())


def test_renormalisation_has_no_gradient_along_mean_and_scale() -> None:
    values = (3 * torch.randn(4, 2, 5, 5, dtype=torch.float64) + 1).requires_grad_()
    mean, std = torch.tensor([0.5, 2.0]).view(2, 1, 1), torch.tensor([2.0, 5.0]).view(2, 1, 1)
    result = renormalise(values, mean, std)
    torch.testing.assert_close(result, (values - mean) / std)
    (result * torch.randn_like(result)).sum().backward()
    assert values.grad.abs().max() > 0.1
    for direction in (torch.ones_like(values), values.detach()):
        assert (values.grad * direction).sum((0, 2, 3)).abs().max() < 1e-10
    constant = renormalise(torch.ones(2, 2, 3, 3), mean, std)
    assert constant.isfinite().all()


def test_latents_shrink_without_the_safeguard_and_not_with_it(tmp_path) -> None:
    options = [*NEW, "--train.steps", "30", "--train.batch_size", "4", "--optim.schedule", "constant"]
    options += ["--joint.nll_weight", "1", "--joint.lr", "1e-2"]
    spread = {}
    for safe in ("true", "false"):
        _, metrics = train(tmp_path / safe, *options, "--joint.renormalise", safe)
        spread[safe] = metrics["means_std"]
    assert spread["true"] == pytest.approx(1, abs=0.35)  # other pictures than those that were measured
    assert spread["false"] < 0.5 * spread["true"]


def test_a_run_learns_resumes_and_draws(tmp_path, monkeypatch) -> None:
    adversarial = ["--joint.loss.adversarial", "0.1", "--joint.loss.adversarial_start", "2"]
    adversarial += ["--joint.loss.discriminator_width", "8", "--joint.loss.discriminator_layers", "1"]
    options = [*NEW, *adversarial, "--data.flip", "true", "--train.accumulation", "2", "--train.steps", "20"]
    options += ["--train.batch_size", "4", "--joint.lr", "1e-3"]
    seen, take = [], Stepper.take

    def recorded(self, *arguments):
        seen.append(take(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(Stepper, "take", recorded)
    trainer, late = train(tmp_path / "whole", *options, "--log.sample_every", "20", "--log.sample_images", "4")
    first, last = (sum(float(values["loss"]) for values in part) for part in (seen[:5], seen[-5:]))
    assert last < 0.92 * first
    assert [{"adversarial", "discriminator"} <= set(values) for values in seen[:4]] == [False, False, True, True]
    assert late["noisy_psnr"] > 9
    assert [group["peak_lr"] for group in trainer.task.learner.optimizer.param_groups] == [1e-3, 1e-3]
    assert [path.name for path in (tmp_path / "whole" / "samples").iterdir()] == ["samples_00000020.png"]

    train(tmp_path / "parts", *options, "--log.checkpoint_every", "15")
    resume = ["--resume", str(tmp_path / "parts" / "checkpoints" / "step_00000015")]
    again, _ = train(tmp_path / "again", *options, *resume)
    assert again.step == 20
    for part in ("flow", "vae"):
        whole, resumed = (
            load_file(tmp_path / run / "pipeline" / part / "diffusion_pytorch_model.safetensors")
            for run in ("whole", "again")
        )
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    current = trainer.task.objective.vae.state_dict()["decoder.conv_out.weight"]
    assert not torch.equal(whole["decoder.conv_out.weight"], current)  # averages are saved

    pipe = TARFlowPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.check_outputs(None, "pil") == (False, "vae")
    assert pipe.check_outputs("score", "pil") == (True, "vae")
    noise = torch.randn(2, 2, 4, 4)
    images = [
        pipe(class_labels=[1, 2], latents=noise, denoise=denoise, decoding="sequential", output_type="np").images
        for denoise in (None, False)
    ]
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)
    pictures = torch.rand(4, 3, 16, 16) * 2 - 1
    std = pipe.vae.encode(pictures).latent_dist.std * 0.5 / torch.tensor(pipe.config.latents_std).view(1, -1, 1, 1)
    torch.testing.assert_close(std, torch.full_like(std, 0.5))
    assert pipe.config.noise_std == 0.5

    for arguments, message in (
        (["--joint.posterior_std", "0.3"], r"joint\.posterior_std is 0\.5 there and 0\.3 here"),
        (["--joint.model", json.dumps({**MODEL, "layers_per_block": 2})], "autoencoder's layers_per_block is 1 there"),
        (["--joint.loss.adversarial", "0"], "discriminator_width and layers is .* there and None here"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "bad", *options, *resume, *arguments)
    # A second stage on the autoencoder as it is now, with the noise that its decoder expects.
    second = ["--init_from", str(tmp_path / "whole" / "pipeline"), "--vae.name", str(tmp_path / "whole" / "pipeline")]
    second += ["--vae.subfolder", "vae", "--train.noise_std", "0.5", "--vae.sample_posterior", "false"]
    frozen, _ = train(tmp_path / "frozen", "--data.image_size", "16", "--train.steps", "1", *second, flow="{}")
    assert frozen.task.parts.codec.latents_std == pipe.config.latents_std
    second[second.index("--vae.sample_posterior") + 1] = "true"  # which would give them the noise twice
    with pytest.raises(ValueError, match=r"was trained along, .* is train\.noise_std: set vae\.sample_posterior false"):
        train(tmp_path / "twice", "--data.image_size", "16", "--train.steps", "1", *second, flow="{}")
    settings = ["--pipeline", str(tmp_path / "whole" / "pipeline"), "--data.image_size", "16"]
    config, _ = parse_dataclass(StudentConfig, settings)
    posterior = torch.zeros(500, 2, 4, 4), torch.ones(500, 2, 4, 4)
    noise = noisy_latents(pipe, config, posterior, 0, range(500)) - pipe.codec.normalise(posterior[0])
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)
    check_posterior(config, pipe)
    with pytest.raises(ValueError, match=r"was trained along, .* set --sample_posterior null"):
        check_posterior(replace(config, sample_posterior=True), pipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--train.noise_std", "0.3"],
            r"latents' noise is joint\.posterior_std \(0\.5\): set train\.noise_std to 0, got 0\.3",
        ),
        (
            ["--vae.name", "none", "--joint.model", "{}"],
            "vae.name is none, which models pixels: there is no autoencoder",
        ),
        (
            ["--data.source", "latents", "--data.path", "x"],
            "data.source is 'latents': latents of a cache do not change",
        ),
        (["--flow.learned_denoiser", "conditional"], "learned_denoiser has nothing to do with vae.train 'joint'"),
        (["--vae.measure_images", "0"], "set vae.measure_images above 0"),
        (["--vae.train", "frozen"], "settings of joint are given, which are for vae.train 'joint', not 'frozen'"),
        (["--joint.model", "{}"], "joint.model is for vae.name 'new', and both must be given"),
        (["--vae.name", "drawings_emoji_f8c8"], "joint.model is for vae.name 'new', and both must be given"),
        (["--joint.model.norm_num_groups", "3"], r"model\.norm_num_groups \(3\) must divide"),
        (["--joint.posterior_std", "0"], r"joint\.posterior_std must be positive, got 0"),
        (["--joint.nll_weight", "-1"], r"joint\.nll_weight must be 0 or positive, got -1"),
        (["--joint.loss.l1", "-1"], r"^joint\.loss\.l1 must be 0 or positive, got -1"),
        (["--joint.loss.adversarial", "1", "--train.mixed_precision", "fp16"], "cannot be trained .* fp16"),
        (["--joint.loss.adversarial", "1"], "pictures of 16 pixels are too small for joint.loss.discriminator_layers"),
        (
            ["--joint.loss.l1", "0", "--joint.loss.l2", "0"],
            "^joint.loss.l1, joint.loss.l2 and joint.loss.perceptual are",
        ),
        (["--joint.loss.perceptual", "1"], "^joint.loss.perceptual needs .*: set joint.loss.perceptual_weights to"),
        (["--joint.loss.perceptual_layers", "[]"], "^joint.loss.perceptual_layers is empty"),
        (["--init_from", "x"], "name that by vae.name instead of 'new'"),
    ],
)
def test_bad_settings(tmp_path, arguments, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path / "run", *NEW, "--train.steps", "1", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_other_autoencoders_and_sharding_are_refused(tmp_path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(latent_channels=4).save_pretrained(tmp_path / "tiny")
    joint = ["--vae.train", "joint", "--train.noise_std", "0", "--vae.name", str(tmp_path / "tiny")]
    with pytest.raises(ValueError, match=r"is for an AutoencoderKL, but .*tiny' is a AutoencoderTiny"):
        train(tmp_path / "run", *joint)
    config, _ = parse_config(["--data", "{}", "--flow", CLASS_FLOW, *NEW, "--output", "x"])
    with pytest.raises(
        ValueError, match=r"cannot be sharded \(FSDP\): use --config_file \$\(tarflow configs accelerate/ddp\)"
    ):
        check_parallel(SimpleNamespace(is_fsdp2=True), config)
    with pytest.raises(ValueError, match="latents of an autoencoder that learns cannot be cached"):
        CacheConfig(output="x", data=DataConfig(source="drawings"), vae=VaeConfig(train="joint"))


def test_configurations_of_few_tokens() -> None:
    """Pictures of 128 pixels become 64 tokens of 32 numbers, of a frozen autoencoder and of one that is trained along."""
    joint, _ = parse_config(["--config", str(ROOT / "configs" / "emoji128_f16_joint.yaml")])
    frozen, _ = parse_config(["--config", str(ROOT / "configs" / "emoji128_f16.yaml")])
    model = yaml.safe_load((ROOT / "configs" / "vae_f16.yaml").read_text())["model"]
    assert joint.joint.model == model
    assert (joint.flow, joint.data.image_size) == (frozen.flow, frozen.data.image_size)
    with torch.device("meta"):
        vae = AutoencoderKL(**model)
        latents = vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mean
        flow = TARFlowModel(**joint.flow, in_channels=32, sample_size=8, cond_dim=joint.text.width)
    assert latents.shape == (1, 32, 8, 8)
    assert flow.patchify(latents)[0].shape == (1, 64, 32)

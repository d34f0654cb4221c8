"""The autoencoder that is trained: from its arguments or from a saved one, its posterior, and what is saved of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tarflow.common.checks import check
from tarflow.pipeline.loading.folder import usual_rights, written_into
from tarflow.training.autoencoder.config import TrainVaeConfig
from tarflow.vae.codec import load_autoencoder


def make_autoencoder(config: TrainVaeConfig) -> AutoencoderKL:
    """The autoencoder at the start of a run, in float32.

    Raises:
        ValueError: for arguments that do not fit together or the pictures, or an ``init_from`` that has others.
    """
    arguments, start = config.model, None
    if config.init_from is not None:
        start = load_autoencoder(config.init_from)
        check(
            isinstance(start, AutoencoderKL),
            f"init_from must name an AutoencoderKL, but {config.init_from!r} is a {type(start).__name__}",
        )
        arguments = started_arguments(arguments, start, config.init_from)
    vae = new_autoencoder(arguments, config.image_size)
    if start is not None:
        vae.load_state_dict(start.state_dict())
    return vae.train()


def new_autoencoder(arguments: dict[str, Any], image_size: int) -> AutoencoderKL:
    """An autoencoder with random weights.

    Raises:
        ValueError: for arguments that do not fit together or pictures of that size.
    """
    check_arguments(arguments, image_size)
    try:
        return AutoencoderKL(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"these model arguments make no AutoencoderKL: {' '.join(str(error).split())}") from error


def argument_defaults() -> dict[str, Any]:
    """Arguments of ``AutoencoderKL`` and their defaults."""
    parameters = inspect.signature(AutoencoderKL.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def check_arguments(arguments: dict[str, Any], image_size: int) -> None:
    """An error for arguments of ``AutoencoderKL`` that do not fit together, or pictures of that size."""
    defaults = argument_defaults()
    if unknown := sorted(set(arguments) - set(defaults)):
        raise ValueError(f"unknown key model.{unknown[0]}; the model section has {', '.join(defaults)}")
    model = {**defaults, **arguments}
    channels = model["block_out_channels"]
    for name in ("down_block_types", "up_block_types"):
        check(
            len(model[name]) == len(channels),
            f"model.{name} has {len(model[name])} entries, but model.block_out_channels has {len(channels)}",
        )
    groups = model["norm_num_groups"]
    for count in channels:
        check(
            count % groups == 0,
            f"model.norm_num_groups ({groups}) must divide all of model.block_out_channels, and does not divide {count}",
        )
    for name in ("in_channels", "out_channels"):
        check(model[name] == 3, f"model.{name} must be 3, as pictures have three colours, got {model[name]}")
    for name in ("latent_channels", "layers_per_block"):
        check(model[name] >= 1, f"model.{name} must be at least 1, got {model[name]}")
    factor = 2 ** (len(channels) - 1)
    check(
        image_size % factor == 0,
        f"data.image_size must be a multiple of {factor}, the factor of {len(channels)} blocks, got {image_size}",
    )


def started_arguments(given: dict[str, Any], start: AutoencoderKL, name: str) -> dict[str, Any]:
    """Arguments of the autoencoder ``start``, which given ones must equal; the sample size, which changes no weight,
    may be another."""
    own = {key: plain(start.config[key]) for key in argument_defaults()}
    for key, value in given.items():
        if key in own and key != "sample_size" and own[key] != plain(value):
            raise ValueError(f"model.{key} is {value}, but the autoencoder {name!r} has {own[key]}; leave it out")
    return {**own, **given}


def plain(value: Any) -> Any:
    """A setting as JSON keeps it."""
    return list(value) if isinstance(value, tuple) else value


class Reconstruction(nn.Module):
    """Encode, draw from the posterior and decode in one forward, as distributed training wants it.

    Args:
        vae: the autoencoder.
        posterior_std: σ of a constant posterior; None takes the encoder's.
    """

    def __init__(self, vae: AutoencoderKL, posterior_std: float | None):
        super().__init__()
        self.vae, self.posterior_std = vae, posterior_std

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) in [−1, 1] and normal noise (B, C, h, w) → mean and log σ² of the posterior, both
        (B, C, h, w), and what mean + σ · noise is decoded to, (B, 3, H, W); all in float32."""
        posterior = self.vae.encode(images).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        if self.posterior_std is not None:
            log_variance = torch.full_like(mean, 2 * math.log(self.posterior_std))
        decoded = self.vae.decode(mean + (log_variance / 2).exp() * noise).sample
        return mean, log_variance, decoded.float()

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last layer."""
        return self.vae.decoder.conv_out.weight


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, σ²) from N(0, 1), ½ (mean² + σ² − 1 − log σ²), mean over all numbers, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


@torch.no_grad()
def fix_posterior(vae: AutoencoderKL, std: float | Sequence[float]) -> None:
    """Fix the posterior's σ at ``std`` for all pictures, one number or one for each channel: the encoder's last
    convolution then gives log σ² as a bias alone."""
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    rows = slice(vae.config.latent_channels, None)  # the means come first
    last.weight[rows] = 0.0
    last.bias[rows] = 2 * torch.tensor(std, dtype=last.bias.dtype, device=last.bias.device).log()


def copy_for_use(vae: AutoencoderKL, posterior_std: float | None) -> AutoencoderKL:
    """A copy as it is evaluated and saved, on the same device: with its posterior fixed if that is constant."""
    return with_weights(vae, vae.state_dict(), posterior_std).to(vae.device)


def with_weights(
    vae: AutoencoderKL, weights: dict[str, Tensor], posterior_std: float | Sequence[float] | None
) -> AutoencoderKL:
    """A copy of ``vae`` with other weights, in the host's memory, for evaluation and saving. Its posterior is fixed to
    a σ (see `fix_posterior`) unless that is None."""
    copy = AutoencoderKL(**{key: vae.config[key] for key in argument_defaults()})
    copy.load_state_dict(weights)
    if posterior_std is not None:
        fix_posterior(copy, posterior_std)
    return copy.eval().requires_grad_(False)


def check_unused(output: Path) -> None:
    """Whether a new autoencoder can be written into a folder without replacing what another run left there.

    Raises:
        ValueError: if it has an autoencoder or a pipeline.
    """
    there = next((name for name in ("model_index.json", "config.json") if (output / name).exists()), None)
    if there is not None:
        what = "an autoencoder" if there == "config.json" else "a pipeline"
        raise ValueError(
            f"the folder {str(output)!r} has {what} already ({there}), which a new run would replace: give another output, or "
            "go on with that run by --resume latest"
        )


def save_autoencoder(vae: AutoencoderKL, output: Path, dtype: str, card: str) -> None:
    """Write the autoencoder, whole or not at all; its weights are of type ``dtype`` afterwards. A README.md that is there
    stays: the user may have written in it."""
    nn.Module.to(vae, getattr(torch, dtype))  # Diffusers' own method warns of layers to keep in float32: there are none
    with written_into(output) as temporary:
        vae.save_pretrained(temporary)
        usual_rights(temporary)
        if card and not (output / "README.md").exists():
            (temporary / "README.md").write_text(card, encoding="utf-8")

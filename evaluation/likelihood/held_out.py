"""Likelihood of held-out pictures under a trained pipeline's flow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow.common.dtypes import exact_convolutions
from tarflow.common.progress import progress_bar
from tarflow.common.seeds import image_seed
from tarflow.common.statistics import mean_and_error
from tarflow.data.images import Pictures, collate, to_model
from tarflow.data.subset import check_not_empty
from tarflow.flows.likelihood import bits_per_dim, dequantize, log_prob, nats_per_dim
from tarflow.flows.trajectory.kinds import check_flow_kind
from tarflow.pipeline.call.flow_pipeline import FlowPipeline
from tarflow.pipeline.call.walk import resolve_level
from tarflow.pipeline.conditions import check_class_names, condition_of

#: What likelihoods are measured in, by the names of `Likelihood`.
UNITS = {
    "bits_per_dim": "bits per dimension",
    "latent_nats_per_dim": "nats per latent dimension",
    "pixel_nats_per_dim": "nats per dimension of noisy pixels",
}


@dataclass(frozen=True)
class Likelihood:
    """Means over pictures, each with the standard error of that mean.

    Attributes:
        name: "bits_per_dim" of 8-bit pictures, "latent_nats_per_dim", or of pixels with the noise of a level
            "pixel_nats_per_dim". No two of them can be compared.
        mean, standard_error: over pictures, each the mean of its draws.
        draws: how many draws of noise each picture had.
        draw_error: standard error of ``mean`` from the noise alone; None with a single draw.
        bound: of pixel models, the importance-weighted bound (lower is tighter), None if not asked for.
        bound_error: its standard error over pictures.
        images: how many pictures.
        noise_level: of a flow of many levels, that of the noise in what the likelihood is of; None for one of one level.
    """

    name: str
    mean: float
    standard_error: float
    draws: int
    draw_error: float | None
    bound: float | None
    bound_error: float | None
    images: int
    noise_level: float | None = None


def evaluate_likelihood(
    pipe: FlowPipeline,
    images: Pictures,
    count: int | None = None,
    draws: int = 4,
    importance: int = 0,
    with_condition: bool = True,
    batch_size: int = 64,
    seed: int = 0,
    noise_level: float | None = None,
) -> Likelihood:
    """Likelihood of the first ``count`` pictures.

    Args:
        pipe, images, count, draws, importance, with_condition, batch_size, seed, noise_level: as of
            `picture_likelihoods`.

    Raises:
        ValueError: if data and model do not fit, or a number is out of range.
    """
    level = resolve_level(pipe.noise_levels, noise_level)
    name, values, bounds = picture_likelihoods(
        pipe, images, count, draws, importance, with_condition, batch_size, seed, level
    )
    bound, bound_error = (None, None) if bounds is None else mean_and_error(bounds)
    mean, standard_error = mean_and_error(values.mean(1))
    count = len(values)
    draw_error = float(values.std(1).pow(2).mean().div(draws * count).sqrt()) if draws > 1 else None
    return Likelihood(name, mean, standard_error, draws, draw_error, bound, bound_error, count, level)


@torch.no_grad()
def picture_likelihoods(
    pipe: FlowPipeline,
    images: Pictures,
    count: int | None = None,
    draws: int = 4,
    importance: int = 0,
    with_condition: bool = True,
    batch_size: int = 64,
    seed: int = 0,
    noise_level: float | None = None,
) -> tuple[str, Tensor, Tensor | None]:
    """Likelihood of each of the first ``count`` pictures.

    Pixel models: bits per dimension of the 8-bit pictures, −log₂ p(x) / dims, bounded from above by the mean over
    uniform dequantisation noise u of −log₂ p(x + u); ``importance`` draws K give the tighter bound
    −log₂ (1/K)·Σ p(x + u_k) (Burda et al., 2015). Latent models: nats per dimension of the latents (posterior modes)
    with the training noise. Flows of many noise levels: nats per dimension of latents or pixels with the noise of
    ``noise_level``. The noise of picture i depends on ``seed`` and i alone.

    Args:
        pipe: a `TARFlowPipeline`.
        images: the data.
        count: how many pictures; None takes all.
        draws: of noise for each picture.
        importance: K, or 0 for no such bound.
        noise_level: of a flow of many levels; None is its highest.
        with_condition: use the data's labels or captions, if the model takes them; else "no condition".

    Returns:
        the quantity's name as in `Likelihood`, its values (N, draws), and the bounds (N,), None if not asked for.

    Raises:
        ValueError: if data and model do not fit, or a number is out of range.
    """
    count = check_arguments(pipe, images, count, draws, importance)
    if with_condition:
        check_class_names(pipe, images.class_names)
    level = resolve_level(pipe.noise_levels, noise_level)
    pixels, dequantized = pipe.vae is None, pipe.vae is None and level is None
    nats: list[Tensor] = []  # (B, draws) each
    bounds: list[Tensor] = []  # (B,) each
    for indices, batch in batches(images, count, batch_size):
        uint8 = batch["image"].to(pipe.flow.device)
        condition = condition_of(pipe, batch, len(indices), with_condition, level)
        log_probs = []
        for draw in range(max(draws, importance)):
            x = noisy(pipe, uint8, seed, indices, draw, level)
            dims = x[0].numel()  # the same for all draws
            log_probs.append(log_prob(pipe.flow, x, **condition).cpu().double())
        stacked = torch.stack(log_probs, dim=1)  # (B, draws)
        nats.append(nats_per_dim(stacked[:, :draws], dims))
        if importance:
            bounds.append(nats_per_dim(stacked[:, :importance].logsumexp(1) - math.log(importance), dims))
    values = torch.cat(nats)
    if dequantized:
        values = bits_per_dim(values)
    name = "bits_per_dim" if dequantized else "pixel_nats_per_dim" if pixels else "latent_nats_per_dim"
    return name, values, bits_per_dim(torch.cat(bounds)) if importance else None


def check_arguments(pipe: FlowPipeline, images: Pictures, count: int | None, draws: int, importance: int) -> int:
    """How many pictures there will be, if data, model and numbers fit."""
    check_flow_kind(pipe.flow, "likelihoods of pictures are")
    check_not_empty(len(images), images.split)
    count = len(images) if count is None else min(count, len(images))
    pixels = pipe.vae is None
    for name, value, least in (("count", count, 1), ("draws", draws, 1), ("importance", importance, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if importance and not pixels:
        raise ValueError("the importance-weighted bound is for models of pixels; this one models latents")
    if importance and pipe.noise_levels is not None:
        raise ValueError("the importance-weighted bound is of 8-bit pictures; this model's have the noise of a level")
    size = pipe.flow.config.sample_size * pipe.codec.factor
    if images.config.image_size != size:
        raise ValueError(
            f"the model has pictures of {size} pixels, but data.image_size is {images.config.image_size}: "
            f"give --data.image_size {size}"
        )
    if pixels and pipe.flow.config.in_channels != 3:
        raise ValueError(f"the model has {pipe.flow.config.in_channels} channels; pictures have 3")
    return count


def batches(images: Pictures, count: int, batch_size: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
    firsts: Iterable[int] = range(0, count, batch_size)
    for first in progress_bar(firsts, desc="likelihood", unit="batch"):
        indices = list(range(first, min(first + batch_size, count)))
        yield indices, collate([images[i] for i in indices])


def noisy(
    pipe: FlowPipeline, images: Tensor, seed: int, indices: list[int], draw: int, noise_level: float | None = None
) -> Tensor:
    """Dequantised pixels, or latents with the training noise, (B, C, h, w); of a flow of many levels latents or pixels with
    the noise of ``noise_level``, the highest if not said."""
    level = resolve_level(pipe.noise_levels, noise_level)
    with exact_convolutions():
        latents = None if pipe.vae is None else pipe.codec.encode(to_model(images)).float()
    shape = images.shape[1:] if latents is None else latents.shape[1:]
    noise = held_out_noise(shape, seed, indices, draw, uniform=latents is None and level is None).to(images.device)
    if level is not None:
        return (to_model(images) if latents is None else latents) + level * noise
    return dequantize(images, noise) if latents is None else latents + pipe.config.noise_std * noise


def held_out_noise(
    shape: Sequence[int], seed: int, indices: Iterable[int], draw: int = 0, uniform: bool = False
) -> Tensor:
    """Noise (B, *shape) of pictures by number, normal or uniform on [0, 1), on the CPU: the same at every call."""
    draw_noise = torch.rand if uniform else torch.randn
    generators = (torch.Generator().manual_seed(image_seed(seed, index) * 1_009 + draw) for index in indices)
    return torch.stack([draw_noise(tuple(shape), generator=generator) for generator in generators])

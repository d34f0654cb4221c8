"""The parts of a run, made from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow.data.images import Images, to_model
from tarflow.flows.likelihood import dequantize
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.text import embedding_width
from tarflow.training.batches import fixed_batches
from tarflow.training.config import RunConfig, TrainConfig
from tarflow.training.text import load_text
from tarflow.vae.codec import LatentCodec, load_autoencoder, measure_latents


@dataclass
class Parts:
    """Data, autoencoder, text encoder and flow of a run.

    Attributes:
        validation: None if nothing is held out.
        flow_arguments: the complete arguments of ``flow``.
    """

    train: Images
    validation: Images | None
    codec: LatentCodec
    text_encoder: Any
    tokenizer: Any
    flow: TARFlowModel
    flow_arguments: dict[str, Any]


def noisy_latents(
    codec: LatentCodec, images: Tensor, train: TrainConfig, generator: torch.Generator | None, sample: bool
) -> Tensor:
    """What the flow is trained on: latents (or pixels) with noise, (B, C, h, w) float32.

    Args:
        images: uint8 pictures (B, 3, S, S).
        generator: of the noise and the posterior draw, on the images' device or the CPU.
        sample: draw from the autoencoder's posterior; else take its mode.
    """
    device = generator.device if generator is not None else images.device
    if train.noise == "uniform":
        return dequantize(images, torch.rand(images.shape, generator=generator, device=device).to(images.device))
    latents = codec.encode(to_model(images), sample=sample, generator=generator).float()
    noise = torch.randn(latents.shape, generator=generator, device=device).to(images.device)
    return latents + train.noise_std * noise


def make_parts(config: RunConfig, statistics: tuple[list[float], list[float]] | None, device: torch.device) -> Parts:
    """Open the data, load the encoders, measure the latents (unless ``statistics`` are given) and make the flow.

    Raises:
        ValueError: if the parts do not fit together.
    """
    train, validation = Images(config.data, "train"), Images(config.data, "validation")
    conditioning = config.flow.get("conditioning", "none")
    if conditioning.startswith("class") and train.class_names is None:
        raise ValueError(
            f"flow.conditioning is {conditioning!r}, but the data has no classes (folders or label column)"
        )
    if (conditioning == "prefix") != (config.text.kind != "none"):
        raise ValueError(
            f"flow.conditioning is {conditioning!r} and text.kind is {config.text.kind!r}: captions need 'prefix' and "
            "a text encoder, other conditionings need text.kind 'none'"
        )
    if conditioning == "prefix" and not train.source.has_captions:
        raise ValueError("the data has no captions: give data.caption_column or a folder with metadata.jsonl")

    vae = load_autoencoder(config.vae.name, config.vae.subfolder)
    if vae is not None:
        vae.to(device)
    pixels = config.data.image_size
    if pixels % LatentCodec(vae).factor:
        raise ValueError(
            f"data.image_size ({pixels}) must be a multiple of {LatentCodec(vae).factor}, the autoencoder's"
        )
    mean = std = None
    if vae is not None and config.vae.measure_images:
        if statistics is None:
            batches = fixed_batches(train, config.vae.measure_images, 64)
            statistics = measure_latents(vae, batches, lambda batch: to_model(batch["image"]).to(device))
        mean, std = statistics
    codec = LatentCodec(vae, mean, std)

    captions: Any = ()
    if config.text.kind == "small":
        captions = (train.source.caption(i) for i in range(min(config.text.vocab_captions, len(train))))
    torch.manual_seed(config.train.seed)
    text_encoder, tokenizer = load_text(config.text, captions)
    with torch.no_grad():
        shape = codec.encode(torch.zeros(1, 3, pixels, pixels, device=device)).shape
    arguments = dict(config.flow)
    derived: dict[str, Any] = {"in_channels": shape[1], "sample_size": shape[2]}
    if conditioning.startswith("class"):
        derived["num_classes"] = len(train.class_names or ())
    if text_encoder is not None:
        derived["cond_dim"] = embedding_width(text_encoder)
    for key, value in derived.items():
        if arguments.setdefault(key, value) != value:
            raise ValueError(f"flow.{key} is {arguments[key]}, but data and encoders give {value}; leave it out")
    flow = TARFlowModel(**arguments)
    return Parts(train, validation if len(validation) else None, codec, text_encoder, tokenizer, flow, arguments)

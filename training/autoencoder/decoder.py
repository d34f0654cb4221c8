"""Finetuning a pipeline's decoder: it learns to decode latents with the training noise, while all else stays frozen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tarflow.data.images import Pictures, to_model
from tarflow.data.stream.first import AnyPictures
from tarflow.evaluation.reconstruction.noisy import NoisyPictures, noisy_pictures
from tarflow.training.autoencoder.decoder_config import DecoderConfig
from tarflow.training.loop.agreement import main_alone
from tarflow.training.loop.batches import chosen
from tarflow.training.loop.component import (
    ComponentFolders,
    check_posterior,
    example_line,
    noisy_latents,
    open_splits,
    posterior_of,
    samples_posterior,
    write_rows,
)
from tarflow.training.loop.draws import draw_flipped
from tarflow.training.loop.network_trainer import network_trainer
from tarflow.training.loop.task import Batch, State
from tarflow.training.losses.task import PictureTask
from tarflow.vae.codec import weights_hash
from tarflow.vae.decoder import DecoderHalf, decoder_of


class DecoderTask(PictureTask):
    """What is trained: a copy of the autoencoder's decoder.

    Args:
        config: of the run.
        accelerator: of the run.

    Raises:
        ValueError: if there is no such pipeline, or it lacks the decoder to start from.
    """

    config: DecoderConfig
    train: AnyPictures
    network: DecoderHalf

    def __init__(self, config: DecoderConfig, accelerator: Accelerator):
        super().__init__(config, accelerator, config.folder, config.loss, config.image_size)
        self.folders = ComponentFolders(config)
        self.held_out: NoisyPictures | None = None
        self.before: dict[str, list[Tensor]] = {}

    def make_parts(self, state: State | None) -> None:
        config, accelerator = self.config, self.accelerator
        self.pipe = self.folders.open("cpu")
        if self.pipe.vae is None:
            raise ValueError(f"the pipeline {config.pipeline!r} models pixels: it has no decoder to finetune")
        if config.noise_std is not None:
            self.pipe.register_to_config(noise_std=config.noise_std)
        self.noise_std = self.pipe.config.noise_std
        check_posterior(config, self.pipe)
        self.train, held_out = open_splits(config, self.pipe)
        self.encoder_hash = weights_hash(self.pipe.vae)
        self.network = self.start_network().train().requires_grad_(True)
        self.pipe.vae.to(accelerator.device)
        if len(held_out):
            self.validation = held_out
            main_alone(accelerator, lambda: self.prepare_held_out(held_out))

    def start_network(self) -> DecoderHalf:
        """The decoder as training begins, in float32."""
        if self.config.start == "vae":
            return decoder_of(self.pipe.vae)
        finetuned = self.pipe.finetuned_decoder
        if finetuned is None:
            raise ValueError(
                f"start=finetuned begins from the finetuned decoder of {self.config.pipeline!r}, which has none: "
                "leave --start out"
            )
        return copy.deepcopy(finetuned).float()

    def ending(self) -> str:
        line = example_line(self.folders.target, self.train, self.pipe.flow.config.conditioning)
        return f"to draw with it:\n  {line}"

    def prepare_held_out(self, images: Pictures) -> None:
        """Noisy held-out latents, and how they are decoded without the new decoder."""
        self.pipe.to(self.accelerator.device)
        self.held_out = noisy_pictures(self.pipe, images, self.config.eval_images, self.config.batch_size)
        self.before = {name: self.held_out.decoded(self.pipe, name) for name in ("none", "score")}
        for module in (self.pipe.flow, self.pipe.text_encoder):  # they are not needed any more
            if module is not None:
                module.to("cpu")

    @property
    def last_layer(self) -> nn.Parameter:
        return self.network.last_layer

    def network_invariants(self) -> dict[str, Any]:
        sampled = samples_posterior(self.config, self.pipe)
        facts = {"the autoencoder's SHA-256": self.encoder_hash, "noise_std": self.noise_std}
        return {**facts, "sample_posterior": sampled}

    def decode(
        self, model: nn.Module, batch: Batch, step: int, sample_ids: Sequence[int]
    ) -> tuple[Tensor, Tensor, dict[str, tuple[float, Tensor]]]:
        """Latents with noise, decoded, as the flow sees them in its training; no further losses."""
        flipped = draw_flipped(self.config.data.flip, self.config.seed, step, sample_ids, self.accelerator.device)
        posterior = posterior_of(self.pipe, self.accelerator, batch, flipped)
        noisy = noisy_latents(self.pipe, self.config, posterior, step, sample_ids)
        images = to_model(chosen(batch, "image", flipped, self.accelerator.device))
        return model(self.pipe.codec.raw(noisy)), images, {}

    @torch.no_grad()
    def measure(self, step: int, last: bool) -> dict[str, float]:
        """Measure how noisy held-out latents are decoded: by the autoencoder's decoder, after the score step, and by
        the new decoder, in PSNR and SSIM. Write a grid with a row for each below the originals. The last call saves
        the decoder."""
        metrics: dict[str, float] = {}
        # A copy: Accelerate makes the network itself compute with mixed precision.
        decoder = type(self.network).from_config(self.network.config).eval()
        decoder.load_state_dict(self.network.state_dict())
        if self.held_out is not None:
            self.pipe.register_modules(finetuned_decoder=decoder.to(self.accelerator.device))
            pictures = {**self.before, "finetuned": self.held_out.decoded(self.pipe, "finetuned")}
            for name, decoded in pictures.items():
                metrics |= {f"{measure}_{name}": value for measure, value in self.held_out.quality(decoded).items()}
            rows = [torch.cat(row)[: self.config.grid_images] for row in (self.held_out.originals, *pictures.values())]
            write_rows(rows, self.config.folder / "samples" / f"decoded_{step:08d}.png")
        if last:
            settings = {"decoder": "finetuned"} if self.config.set_default else {}
            self.folders.add("finetuned_decoder", decoder, **settings)
        return metrics


def finetune_decoder(config: DecoderConfig, resolved: str) -> dict[str, Any]:
    """Train, and save the decoder; returns the last metrics.

    Args:
        config: the settings.
        resolved: their YAML, saved with the run.

    Raises:
        ValueError: if settings, pipeline, data or checkpoint do not fit.
        OSError: if a file cannot be written.
    """
    return network_trainer(DecoderTask, config, resolved).run()

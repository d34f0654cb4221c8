"""A batch of pictures, or of cached latents, as what the flow is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tarflow.common.dtypes import exact_convolutions
from tarflow.data.images import to_model
from tarflow.flows.likelihood import dequantize
from tarflow.pipeline.text.encoding import encode_captions
from tarflow.training.flow.config import RunConfig, is_joint, noise_std
from tarflow.training.flow.levels import levels_from, loss_weights
from tarflow.training.flow.setup import Parts
from tarflow.training.flow.tokens import CaptionTokens
from tarflow.training.loop.batches import chosen
from tarflow.training.loop.draws import Purpose, draw_chances, draw_flipped, draw_noise


class InputMaker:
    """Keyword arguments of `FlowObjective` from a batch, with draws that depend on the pictures' sample_ids alone.

    Args:
        config: of the run.
        parts: codec, text encoder, tokenizer and so on.
        device: of the results.
        token_ids: captions are encoded inside the objective, not here.
        autocast: context in which the autoencoder encodes training pictures; held-out ones are encoded exactly.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        device: torch.device,
        token_ids: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.config, self.parts, self.device = config, parts, device
        self.autocast = autocast
        text = config.text
        self.tokens = CaptionTokens(parts.tokenizer, text.max_length, text.options) if token_ids else None

    @torch.no_grad()
    def training(self, batch: dict[str, Any], step: int, sample_ids: Sequence[int]) -> dict[str, Any]:
        """A training batch: pictures are flipped and conditions dropped at random, and the autoencoder's posterior is
        sampled if the settings say so. If the autoencoder is trained along, the batch has the pictures and the noise
        instead of latents."""
        train = self.config.train
        flipped = draw_flipped(self.config.data.flip, train.seed, step, sample_ids, self.device)
        # On the CPU, where captions are chosen by it: reading it from an accelerator would wait for all its work.
        dropped = draw_chances(train.seed, step, sample_ids, torch.device("cpu"), "drop") < train.drop_rate
        more = {"latent_norm_weight": train.latent_norm_weight, **self.conditions(batch, dropped)}
        if is_joint(self.config):
            arguments = self.parts.flow_arguments
            size: tuple[int, ...] = (arguments["in_channels"], arguments["sample_size"], arguments["sample_size"])
            noise = draw_noise(train.seed, step, sample_ids, size, self.device, "noise")
            return {"images": to_model(chosen(batch, "image", flipped, self.device)), "noise": noise, **more}
        with self.autocast():
            mean, std = self.posterior(batch, flipped)
        noise, level = self.noise(step, sample_ids, mean, "noise"), None
        if train.noise_levels is not None:
            level = levels_from(draw_chances(train.seed, step, sample_ids, self.device, "level"), train.noise_levels)
            more |= {"noise_level": level, "loss_weights": loss_weights(level, train.noise_levels.weight)}
        if std is not None and self.config.vae.sample_posterior:
            shape = tuple(mean.shape[1:])
            mean = mean + std * draw_noise(train.seed, step, sample_ids, shape, self.device, "posterior")
        return {"latents": self.noisy(mean, noise, level), **more}

    @torch.no_grad()
    def evaluation(
        self, batch: dict[str, Any], sample_ids: Sequence[int], noise_level: float | None = None
    ) -> dict[str, Any]:
        """A held-out batch: posterior modes with noise that is the same at every call.

        Args:
            noise_level: of that noise, with ``train.noise_levels``; None is the highest.
        """
        with exact_convolutions():
            mean, _ = self.posterior(batch)
        level, more = None, {}
        if self.config.train.noise_levels is not None:
            noise_level = noise_std(self.config) if noise_level is None else noise_level
            level = torch.full((len(mean),), noise_level, device=mean.device)
            more = {"noise_level": level}
        kept = torch.zeros(len(mean), dtype=torch.bool)
        return {
            "latents": self.noisy(mean, self.noise(-1, sample_ids, mean, "held out"), level),
            **self.conditions(batch, kept),
            **more,
        }

    def posterior(self, batch: dict[str, Any], flipped: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the scaled latents of the pictures, (B, C, h, w) each; of mirrored ones where
        ``flipped`` (B,). Pixels that get uniform noise stay 8-bit numbers."""
        if "latent_mean" in batch:
            mean = chosen(batch, "latent_mean", flipped, self.device)
            return mean, chosen(batch, "latent_std", flipped, self.device)
        images = chosen(batch, "image", flipped, self.device)
        if self.config.train.noise == "uniform":
            return images, None
        mean, std = self.parts.codec.encode_posterior(to_model(images))
        return mean.float(), std

    def moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def noise(self, step: int, sample_ids: Sequence[int], like: Tensor, purpose: Purpose) -> Tensor:
        train = self.config.train
        shape = tuple(like.shape[1:])
        return draw_noise(train.seed, step, sample_ids, shape, self.device, purpose, train.noise == "uniform")

    def noisy(self, latents: Tensor, noise: Tensor, level: Tensor | None = None) -> Tensor:
        """Normalised latents (or pixels) with the training noise, (B, C, h, w) float32; of pictures' own levels (B,)."""
        if self.config.train.noise == "uniform":
            return dequantize(latents, noise)
        std = noise_std(self.config) if level is None else level[:, None, None, None]
        return self.parts.codec.normalise(latents) + std * noise

    def conditions(self, batch: dict[str, Any], dropped: Tensor) -> dict[str, Any]:
        """Labels, token ids or encoded captions; "none" where ``dropped`` (B,), on the CPU."""
        parts, text = self.parts, self.config.text
        if classes := parts.flow_arguments.get("num_classes"):
            labels = self.moved(batch["label"])
            return {"class_labels": torch.where(self.moved(dropped), torch.full_like(labels, classes), labels)}
        if text.kind == "none":
            return {}
        if parts.null_cond is not None:  # captions were encoded when the latents were cached
            cond = self.moved(batch["cond"])
            return {"cond": torch.where(self.moved(dropped)[:, None, None], parts.null_cond.to(self.device), cond)}
        pairs = zip(batch["caption"], dropped.tolist(), strict=True)
        captions = ["" if drop else caption for caption, drop in pairs]
        if self.tokens is not None:
            ids, mask = self.tokens(captions)
            return {"input_ids": self.moved(ids), "attention_mask": self.moved(mask)}
        return {"cond": encode_captions(parts.text_encoder, parts.tokenizer, captions, text.max_length, text.options)}

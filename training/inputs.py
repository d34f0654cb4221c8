"""A batch of pictures, or of cached latents, as what the flow is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tarflow.data.images import to_model
from tarflow.flows.likelihood import dequantize
from tarflow.pipeline.text import encode_captions
from tarflow.training.config import RunConfig
from tarflow.training.draws import Draws, draw
from tarflow.training.setup import Parts
from tarflow.training.text import token_ids


class InputMaker:
    """Keyword arguments of `FlowObjective` from a batch, with draws that depend on the pictures' places alone.

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
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.config, self.parts, self.device = config, parts, device
        self.token_ids, self.autocast = token_ids, autocast

    @torch.no_grad()
    def training(self, batch: dict[str, Any], step: int, places: Sequence[int]) -> dict[str, Any]:
        """A training batch: flipped at random, conditions dropped at random, the autoencoder's posterior drawn from."""
        train = self.config.train
        with self.autocast():
            mean, std = self.posterior(batch)
            draws = self.draws(step, places, mean, std, train.drop_rate)
            if self.config.data.flip:
                mean, std = self.flipped(batch, draws.flipped, mean, std)
        if std is not None:
            mean = mean + std * draws.posterior
        return {
            "latents": self.noisy(mean, draws.noise),
            "latent_norm_weight": train.latent_norm_weight,
            **self.conditions(batch, draws.dropped),
        }

    @torch.no_grad()
    def evaluation(self, batch: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
        """A held-out batch: posterior modes with noise that is the same at every call."""
        mean, _ = self.posterior(batch)
        draws = self.draws(-1, places, mean, None)
        return {"latents": self.noisy(mean, draws.noise), **self.conditions(batch, torch.zeros_like(draws.dropped))}

    def posterior(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the scaled latents, (B, C, h, w) each, of the pictures as they are. Pixels that
        get uniform noise stay 8-bit numbers."""
        if "latent_mean" in batch:
            return batch["latent_mean"].to(self.device), batch["latent_std"].to(self.device)
        images = batch["image"].to(self.device)
        if self.config.train.noise == "uniform":
            return images, None
        mean, std = self.parts.codec.encode_posterior(to_model(images))
        return mean.float(), std

    def flipped(
        self, batch: dict[str, Any], flips: Tensor, mean: Tensor, std: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same with some pictures mirrored, ``flips`` (B,)."""
        if "latent_mean" in batch:
            other = batch["latent_mean_flipped"].to(self.device), batch["latent_std_flipped"].to(self.device)
        else:
            other = self.posterior({"image": batch["image"].flip(-1)})
        where = flips[:, None, None, None]
        return torch.where(where, other[0], mean), None if std is None else torch.where(where, other[1], std)

    def draws(
        self, step: int, places: Sequence[int], mean: Tensor, std: Tensor | None, drop_rate: float = 0.0
    ) -> Draws:
        train = self.config.train
        uniform = train.noise == "uniform"
        return draw(train.seed, step, places, tuple(mean.shape[1:]), self.device, drop_rate, uniform, std is not None)

    def noisy(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Normalised latents (or pixels) with the training noise, (B, C, h, w) float32."""
        if self.config.train.noise == "uniform":
            return dequantize(latents, noise)
        return self.parts.codec.normalise(latents) + self.config.train.noise_std * noise

    def conditions(self, batch: dict[str, Any], dropped: Tensor) -> dict[str, Any]:
        """Labels, token ids or encoded captions; "none" where ``dropped`` (B,)."""
        parts, text = self.parts, self.config.text
        if classes := parts.flow_arguments.get("num_classes"):
            labels = batch["label"].to(self.device)
            return {"class_labels": torch.where(dropped, torch.full_like(labels, classes), labels)}
        if text.kind == "none":
            return {}
        if parts.null_cond is not None:  # captions were encoded when the latents were cached
            cond = batch["cond"].to(self.device)
            return {"cond": torch.where(dropped[:, None, None], parts.null_cond.to(self.device), cond)}
        pairs = zip(batch["caption"], dropped.tolist(), strict=True)
        captions = ["" if drop else caption for caption, drop in pairs]
        if self.token_ids:
            ids, mask = token_ids(parts.tokenizer, captions, text.max_length, self.device)
            return {"input_ids": ids, "attention_mask": mask}
        return {"cond": encode_captions(parts.text_encoder, parts.tokenizer, captions, text.max_length)}

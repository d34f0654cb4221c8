"""Diffusers' DiT with flow matching: the model, its sampler and its own way back to noise.

Times σ go from 0, data, to 1, noise: x_σ = (1 − σ)·data + σ·noise, and the model learns the velocity noise − data
(Lipman et al., 2022, arXiv:2210.02747), as of Stable Diffusion 3.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from torch import Tensor, nn

from tarflow.experiments.peers.settings import DiffusionConfig
from tarflow.pipeline.text.encoding import hidden_states

#: What Diffusers' schedulers and embeddings count times by.
TIMES = 1000


class DiffusionModel(nn.Module):
    """A Transformer of Diffusers that predicts velocities, with the text encoder that learns along.

    Args:
        config: its sizes.
        channels, side: of the latents.
        classes: how many, for class labels; the one after the last is no class.
        text_encoder: a T5 encoder, for captions.

    Raises:
        ValueError: if the width is no multiple of the heads'.
    """

    def __init__(self, config: DiffusionConfig, channels: int, side: int, classes: int = 0, text_encoder: Any = None):
        super().__init__()
        if config.width % config.head_dim:
            raise ValueError(f"width must be a multiple of head_dim, got {config.width} and {config.head_dim}")
        shape: dict[str, Any] = {
            "num_attention_heads": config.width // config.head_dim,
            "attention_head_dim": config.head_dim,
            "in_channels": channels,
            "out_channels": channels,
            "num_layers": config.layers,
            "sample_size": side,
            "patch_size": 1,
        }
        self.text_encoder = text_encoder
        if text_encoder is None:
            self.transformer = DiTTransformer2DModel(**shape, num_embeds_ada_norm=classes)
            for block in self.transformer.transformer_blocks:  # conditions are dropped by the training, reproducibly
                block.norm1.emb.class_embedder.dropout_prob = 0.0
        else:
            self.transformer = PixArtTransformer2DModel(
                **shape, cross_attention_dim=config.width, caption_channels=text_encoder.config.d_model
            )
        self.null_label, self.shape = classes, (channels, side, side)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """What `velocity` takes of captions, of token ids and mask (B, L)."""
        hidden = hidden_states(self.text_encoder, input_ids, attention_mask)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": attention_mask}

    def velocity(self, x: Tensor, time: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """dx/dσ (B, C, h, w) at the times σ (B,)."""
        found: Tensor = self.transformer(x, timestep=time * TIMES, **condition).sample
        return found

    def forward(self, latents: Tensor, noise: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        """The mean squared error of velocities.

        Args:
            latents, noise: (B, C, h, w).
            time: σ (B,).
            condition: "class_labels" (B,), or "input_ids" and "attention_mask" (B, L).
        """
        given = self.encode(**condition) if "input_ids" in condition else condition
        along = time[:, None, None, None]
        found = self.velocity((1 - along) * latents + along * noise, time, given)
        return (found.float() - (noise - latents)).square().mean()


def scheduler(steps: int) -> FlowMatchEulerDiscreteScheduler:
    """Euler's method with times at equal distances, as the pipelines of Diffusers set them."""
    made = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES)
    made.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    return made


@torch.no_grad()
def sample(
    model: DiffusionModel,
    noise: Tensor,
    condition: dict[str, Tensor],
    null: dict[str, Tensor] | None,
    scale: float,
    steps: int,
) -> Tensor:
    """Latents (B, C, h, w) of noise.

    Args:
        model: the model.
        noise: (B, C, h, w).
        condition, null: see `DiffusionModel.velocity`; the second is no condition, for guidance.
        scale: of classifier-free guidance; 1 is off.
        steps: of the sampler.
    """
    made, x = scheduler(steps), noise
    guided = scale > 1 and null is not None
    given = {name: torch.cat([condition[name], (null or {})[name]]) for name in condition} if guided else condition
    for time in made.timesteps:
        shown = torch.cat([x, x]) if guided else x
        found = model.velocity(shown, (time / TIMES).expand(len(shown)), given)
        if guided:
            with_it, without = found.chunk(2)
            found = without + scale * (with_it - without)
        x = made.step(found, time, x).prev_sample
    return x


@torch.no_grad()
def to_noise(model: DiffusionModel, latents: Tensor, condition: dict[str, Tensor], steps: int) -> Tensor:
    """The way back by as many of Euler's steps, from data to noise, without guidance: (B, C, h, w)."""
    times, x = scheduler(steps).sigmas.flip(0).tolist(), latents
    for time, later in pairwise(times):
        x = x + (later - time) * model.velocity(x, torch.full((len(x),), time), condition)
    return x


def matched_layers(
    config: DiffusionConfig, channels: int, side: int, classes: int, text_encoder: Any, wanted: int
) -> int:
    """How many layers bring the Transformer's parameters nearest to ``wanted``, at least one."""

    def count(layers: int) -> int:
        with torch.device("meta"):
            model = DiffusionModel(replace(config, layers=layers), channels, side, classes, text_encoder)
        return parameters_of(model.transformer)

    one, two = count(1), count(2)
    return max(1, round(1 + (wanted - one) / (two - one)))


def parameters_of(module: nn.Module) -> int:
    """How many numbers of a module are learned."""
    return sum(parameter.numel() for parameter in module.parameters())

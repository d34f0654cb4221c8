"""Small autoencoders, and training them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from helpers import fresh_process

from tarflow.common.arguments import parse_dataclass
from tarflow.training.autoencoder.config import TrainVaeConfig
from tarflow.training.autoencoder.task import autoencoder_trainer
from tarflow.training.loop.trainer import Trainer


def small_autoencoder(**changes) -> AutoencoderKL:
    arguments = {
        "latent_channels": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    }
    return AutoencoderKL(**{**arguments, **changes}).eval().requires_grad_(False)


def save_autoencoder(path: Path, seed: int = 0) -> str:
    """A random autoencoder of factor 2."""
    torch.manual_seed(seed)
    channels = {f"{side}_block_out_channels": (4, 4) for side in ("encoder", "decoder")}
    vae = AutoencoderTiny(**channels, latent_channels=2, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    vae.save_pretrained(path)
    return str(path)


MODEL: dict[str, Any] = {
    "latent_channels": 2,
    "sample_size": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 8, 8],
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.0,
}
SETTINGS = [
    *("--sources", '{"drawings": {"data": {"source": "drawings", "image_size": 32}}}'),
    *("--batch_size", "4", "--warmup_steps", "2", "--ema_decay", "0.9", "--mixed_precision", "no", "--lr", "3e-3"),
    *("--eval_every", "0", "--eval_images", "10", "--checkpoint_every", "0", "--trackers", "[]", "--dtype", "float32"),
]


def arguments(folder: Path, *settings: str, **model: Any) -> list[str]:
    return [*SETTINGS, "--model", json.dumps({**MODEL, **model}), "--output", str(folder), *settings]


def trainer(argv: list[str]) -> Trainer:
    """As a fresh process would make it."""
    fresh_process()
    return autoencoder_trainer(*parse_dataclass(TrainVaeConfig, argv))


def train(folder: Path, *settings: str, **model: Any) -> dict[str, Any]:
    return trainer(arguments(folder, *settings, **model)).run()

"""Finetuned decoders in small pipelines, and training them."""

from __future__ import annotations

import torch
from autoencoders import small_autoencoder
from helpers import fresh_process, small_model

from tarflow import TARFlowPipeline
from tarflow.common.arguments import parse_dataclass
from tarflow.training.autoencoder.decoder import finetune_decoder
from tarflow.training.autoencoder.decoder_config import DecoderConfig
from tarflow.vae.decoder import LatentDecoder


def with_decoder(pipe: TARFlowPipeline, default: str = "finetuned") -> TARFlowPipeline:
    """The pipeline with a finetuned decoder that differs from the autoencoder's."""
    decoder = LatentDecoder.from_autoencoder(pipe.vae)
    with torch.no_grad():
        decoder.last_layer.mul_(1.5)
    pipe.register_modules(finetuned_decoder=decoder)
    pipe.register_to_config(decoder=default)
    return pipe


def tiny_pipeline(folder) -> TARFlowPipeline:
    """A pipeline of drawings of 16 × 16 pixels in its folder, with files of other origins beside its own."""
    torch.manual_seed(0)
    vae = small_autoencoder(scaling_factor=1.0, shift_factor=None, mid_block_add_attention=False)
    flow = small_model(in_channels=8, sample_size=8, conditioning="none", num_classes=0, cond_dim=0)
    pipe = TARFlowPipeline(flow, vae, latents_mean=[0.0] * 8, latents_std=[1.0] * 8, noise_std=0.5)
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text("a card")
    (folder / "decoding.json").write_text("{}")
    return pipe


def finetune(pipeline, output, *arguments) -> dict[str, float]:
    """Run as a fresh process would."""
    fresh_process()
    settings = [
        *("--pipeline", str(pipeline), "--output", str(output), "--data.image_size", "16", "--trackers", "[]"),
        *("--mixed_precision", "no", "--batch_size", "8", "--lr", "3e-3", "--warmup_steps", "2", "--ema_decay", "0.9"),
        *("--eval_every", "0", "--eval_images", "16", "--checkpoint_every", "0", "--steps", "6"),
    ]
    return finetune_decoder(*parse_dataclass(DecoderConfig, [*settings, *arguments]))

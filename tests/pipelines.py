"""Small pipelines, and drawing with them."""

from __future__ import annotations

import torch
from transformers import T5EncoderModel

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.training.flow.config import TextConfig
from tarflow.training.flow.text import small_t5, train_tokenizer
from tarflow.vae.codec import load_autoencoder

CAPTIONS = ["a red ring", "a blue star on a dark background"]


def make_pipeline(conditioning="class_prefix", vae=True, sample_size=4, noise_levels=None, **options):
    flow = TARFlowModel(
        in_channels=8 if vae else 3,
        sample_size=sample_size,
        width=64,
        head_dim=32,
        conditioning=conditioning,
        num_classes=3 if conditioning.startswith("class") else 0,
        cond_dim=16 if conditioning == "prefix" else 0,
        **{"layers_per_block": (1, 1), **options},
    )
    with torch.no_grad():
        for parameter in flow.parameters():  # a new flow is the identity
            parameter.add_(0.02 * torch.randn_like(parameter))
    text_encoder = tokenizer = None
    if conditioning == "prefix":
        config = TextConfig(kind="small", width=16, heads=2, layers=1, max_length=8)
        tokenizer = train_tokenizer(CAPTIONS, config)
        text_encoder = T5EncoderModel(small_t5(config, len(tokenizer))).eval()
    pipe = TARFlowPipeline(
        flow.eval(),
        load_autoencoder("drawings_emoji_f8c8") if vae else None,
        text_encoder,
        tokenizer,
        latents_mean=[0.1] * 8 if vae else None,
        latents_std=[1.2] * 8 if vae else None,
        noise_std=0.3,
        id2label={0: "Tench", 1: "church", 2: "gas pump"} if conditioning.startswith("class") else None,
        max_sequence_length=8,
        noise_levels=noise_levels,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, *arguments, seeds=(1, 2), **options):
    options.setdefault("output_type", "np")
    return pipe(*arguments, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **options).images

"""Small students in small pipelines, and training them."""

from __future__ import annotations

from typing import Any

import torch
from autoencoders import small_autoencoder
from helpers import fresh_process, perturb, small_model

from tarflow import TARFlowPipeline
from tarflow.common.arguments import parse_dataclass
from tarflow.flows.student import StudentModel
from tarflow.pipeline.call.student_sampling import flow_hashes
from tarflow.training.student.config import StudentConfig
from tarflow.training.student.task import train_student


def small_student(flow, **changes) -> StudentModel:
    """A perturbed student of three layers for a flow of two blocks."""
    config = flow.config
    arguments = {
        **{name: config[name] for name in ("in_channels", "sample_size", "patch_size", "patch_layout")},
        **{name: config[name] for name in ("conditioning", "num_classes", "cond_dim")},
        "num_layers": 3,
        "width": 64,
        "head_dim": 32,
        "state_layers": (1, 2),
        "max_guidance_scale": 1.0 if config.conditioning == "none" else 3.0,
        "flow_hashes": flow_hashes(flow),
    }
    return perturb(StudentModel(**{**arguments, **changes}), 0.05).eval()


def lone_student(**changes: Any) -> StudentModel:
    """A perturbed student of `small_model`'s pictures."""
    arguments = {"in_channels": 2, "sample_size": 4, "num_layers": 2, "width": 64, "head_dim": 32}
    return perturb(StudentModel(**{**arguments, **changes})).eval()


def with_student(pipe: TARFlowPipeline, **changes) -> TARFlowPipeline:
    pipe.register_modules(student=small_student(pipe.flow, **changes))
    return pipe


def tiny_pipeline(folder, conditioning="class_prefix") -> TARFlowPipeline:
    """A pipeline of drawings of 16 × 16 pixels, 16 tokens, in its folder."""
    torch.manual_seed(0)
    vae = small_autoencoder(scaling_factor=1.0, shift_factor=None, mid_block_add_attention=False)
    classes = 36 if conditioning == "class_prefix" else 0
    flow = small_model(in_channels=8, sample_size=8, conditioning=conditioning, num_classes=classes, cond_dim=0)
    pipe = TARFlowPipeline(flow, vae, noise_std=0.3, guidance_scale=2.0 if classes else 1.0)
    pipe.save_pretrained(folder)
    return pipe


def train(pipeline, output, *arguments) -> dict:
    """Run as a fresh process would."""
    fresh_process()
    settings = [
        *("--pipeline", str(pipeline), "--output", str(output), "--data.image_size", "16", "--trackers", "[]"),
        *("--mixed_precision", "no", "--batch_size", "8", "--lr", "3e-3", "--warmup_steps", "2", "--ema_decay", "0.9"),
        *("--eval_every", "0", "--eval_images", "16", "--grid_images", "3", "--checkpoint_every", "0", "--steps", "6"),
        *("--num_layers", "3", "--width", "64", "--head_dim", "32"),
    ]
    return train_student(*parse_dataclass(StudentConfig, [*settings, *arguments]))

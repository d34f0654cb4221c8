"""Small trainings of flows."""

from __future__ import annotations

import pytest
from helpers import fresh_process
from safetensors.torch import load_file

from tarflow.training.flow import text
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.trainer import flow_trainer

SMALL = [
    *("--data.image_size", "32"),
    *("--vae.measure_images", "16"),
    *("--train.batch_size", "8", "--train.mixed_precision", "no", "--train.ema_decay", "0.9"),
    *("--optim.warmup_steps", "2"),
    *("--log.trackers", "[]", "--log.eval_every", "0", "--log.sample_every", "0", "--log.checkpoint_every", "0"),
    *("--log.eval_images", "8"),
]
CLASS_FLOW = '{"layers_per_block": [1, 1], "width": 64, "head_dim": 32, "conditioning": "class_prefix"}'
TEXT_FLOW = CLASS_FLOW.replace("class_prefix", "prefix")
PIXEL_FLOW = (
    '{"layers_per_block": [1, 1], "width": 64, "head_dim": 32, "patch_size": 4, "patch_layout": "channel_first", '
    '"start_token": false, "scale": "exp", "soft_clip": 0, "positions": "learned", "final_norm": false, '
    '"first_order": "row_major", "conditioning": "class_vectors"}'
)


def train(folder, *arguments, flow=CLASS_FLOW, captions_looked_at=100):
    """Run as a fresh process would, but that fewer captions are looked at: there are only a few words in them."""
    fresh_process()
    few = ["--text.vocab_captions", "500"] if "small" in arguments else []
    options = ["--data", "{}", "--flow", flow, *SMALL, *few, "--output", str(folder), *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "LOOKED_AT", captions_looked_at)
        trainer = flow_trainer(*parse_config(options))
        return trainer, trainer.run()


def weights(folder):
    return load_file(folder / "pipeline" / "flow" / "diffusion_pytorch_model.safetensors")

"""Train a small model of pictures and captions, which tells whether pictures show what their captions say.

    tarflow train-captions --data.source folder --data.path pictures.zip --vision google/mobilenet_v2_1.0_224 \\
        --output runs/captions
    tarflow evaluate captions --model runs/captions --samples samples

A vision model of Transformers, which stays as it is, and a small Transformer for captions learn to find each other, from
real pictures alone. Minutes on one CPU core, most of them for features of the pictures, which are kept in the folder. The
model is one of Transformers (VisionTextDualEncoder), and can be given wherever a CLIP model is asked for.
"""

from __future__ import annotations

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.training.captions.config import CaptionModelConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        config, _ = read_settings(
            CaptionModelConfig,
            argv,
            __doc__,
            "tarflow train-captions",
            lambda config: check_writable(config.output, folder=True),
        )
        from tarflow.evaluation.features.caption_ranks import score_lines
        from tarflow.training.captions.training import train_captions

        score = train_captions(config)
        print(f"real held-out pictures:\n{score_lines(score)}\n{config.output}", flush=True)

"""Finetune a pipeline's decoder to take latents with the training noise, so that sampling needs no score step.

    tarflow finetune-decoder --pipeline runs/NAME/pipeline --config decoder \\
        --data.source folder --data.path my_pictures.zip --data.where null --data.caption_template null

Encoder and flow stay as they are. The decoder is put into the pipeline's folder, whose calls then take it (unless
--set_default false), or with --save_to FOLDER into a copy of it. --resume latest goes on from the last
checkpoint. On several devices:
accelerate launch --config_file "$(tarflow configs accelerate/ddp)" -m tarflow.cli finetune-decoder …
"""

from __future__ import annotations

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.training.autoencoder.decoder_config import DecoderConfig


def main(argv: list[str] | None = None) -> None:
    with ending():
        settings = read_settings(DecoderConfig, argv, __doc__, "tarflow finetune-decoder")
        from tarflow.training.autoencoder.decoder import finetune_decoder
        from tarflow.training.loop.stopping import exit_status, launched_process

    with launched_process(), ending():
        if status := exit_status(finetune_decoder(*settings)):
            raise SystemExit(status)

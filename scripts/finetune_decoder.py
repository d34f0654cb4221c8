"""Finetune a pipeline's decoder to take latents with the training noise, so that sampling needs no score step.

    accelerate launch -m tarflow.scripts.finetune_decoder --pipeline runs/NAME/pipeline \\
        --config decoder --data.source folder --data.path my_pictures.zip

Encoder and flow stay as they are. The decoder is put into the pipeline's folder, whose calls then take it (unless
``--set_default false``), or with ``--save_to FOLDER`` into a copy of it. ``--resume latest`` goes on from the last
checkpoint.
"""

from __future__ import annotations

from tarflow.cli.parsing import with_config_file
from tarflow.common.arguments import parse_dataclass
from tarflow.common.command import ending
from tarflow.training.autoencoder.decoder import DecoderConfig, finetune_decoder
from tarflow.training.loop.stopping import exit_status, launched_process


def main(argv: list[str] | None = None) -> None:
    with launched_process(), ending():
        metrics = finetune_decoder(*parse_dataclass(DecoderConfig, with_config_file(argv), __doc__))
        if status := exit_status(metrics):
            raise SystemExit(status)


if __name__ == "__main__":
    main()

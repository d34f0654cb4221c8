"""Train an AutoencoderKL and save it in Diffusers' format.

    tarflow train-vae --config vae_drawings_emoji [--section.key value]

--resume latest goes on from the last checkpoint. The exponential moving average of the weights is what is evaluated and
saved. On several devices:
accelerate launch --config_file "$(tarflow configs accelerate/ddp)" -m tarflow.cli train-vae …
"""

from __future__ import annotations

from typing import Any

from tarflow.cli.parsing import read_settings
from tarflow.common.command import ending
from tarflow.training.autoencoder.config import TrainVaeConfig


def main(argv: list[str] | None = None) -> dict[str, Any]:
    with ending():
        config, resolved = read_settings(TrainVaeConfig, argv, __doc__, "tarflow train-vae")
        from tarflow.training.autoencoder.task import autoencoder_trainer
        from tarflow.training.loop.stopping import exit_status, launched_process

    with launched_process(), ending():
        metrics = autoencoder_trainer(config, resolved).run()
        if status := exit_status(metrics):
            raise SystemExit(status)
        return metrics

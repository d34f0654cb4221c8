"""Train an AutoencoderKL and save it in Diffusers' format.

    accelerate launch -m tarflow.scripts.train_vae --config vae_drawings_emoji [--section.key value]

Plain ``python -m tarflow.scripts.train_vae`` works too, on one device. ``--resume latest`` goes on from the last
checkpoint. The exponential moving average of the weights is what is evaluated and saved.
"""

from __future__ import annotations

from typing import Any

from tarflow.cli.parsing import with_config_file
from tarflow.common.arguments import parse_dataclass
from tarflow.common.command import ending
from tarflow.training.autoencoder.config import TrainVaeConfig
from tarflow.training.autoencoder.task import AutoencoderTrainer
from tarflow.training.loop.stopping import exit_status, launched_process


def main(argv: list[str] | None = None) -> dict[str, Any]:
    with launched_process(), ending():
        config, resolved = parse_dataclass(TrainVaeConfig, with_config_file(argv), __doc__)
        metrics = AutoencoderTrainer(config, resolved).run()
        if status := exit_status(metrics):
            raise SystemExit(status)
        return metrics


if __name__ == "__main__":
    main()

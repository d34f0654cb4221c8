"""Train an AutoencoderKL and save it in Diffusers' format.

    accelerate launch scripts/train_vae.py --config configs/vae_drawings_emoji.yaml [--section.key value]

Plain ``python scripts/train_vae.py`` works too, on one device. ``--resume latest`` goes on from the last checkpoint. The
exponential moving average of the weights is what is evaluated and saved. docs/autoencoders.md tells more.
"""

from __future__ import annotations

from typing import Any

from tarflow.common.command import ending
from tarflow.training.arguments import parse_dataclass
from tarflow.training.autoencoder import AutoencoderTrainer
from tarflow.training.autoencoder_config import TrainVaeConfig


def main(argv: list[str] | None = None) -> dict[str, Any]:
    with ending():
        config, resolved = parse_dataclass(TrainVaeConfig, argv, __doc__)
        return AutoencoderTrainer(config, resolved).run()


if __name__ == "__main__":
    main()

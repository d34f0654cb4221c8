"""Train a latent normalizing flow.

    accelerate launch train_latent.py --config configs/quickstart_text.yaml [--section.key value]

Plain ``python train_latent.py`` works too, on one device. ``--resume latest`` goes on from the last checkpoint.
"""

from __future__ import annotations

from tarflow.training.arguments import fail, parse_config
from tarflow.training.trainer import Trainer


def main(argv: list[str] | None = None) -> dict[str, float]:
    try:
        config, resolved = parse_config(argv, __doc__)
        return Trainer(config, resolved).run()
    except (ValueError, OSError) as error:
        fail(error)
        raise


if __name__ == "__main__":
    main()

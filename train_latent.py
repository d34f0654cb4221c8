"""Train a latent normalizing flow.

    accelerate launch train_latent.py --config configs/quickstart_text.yaml [--section.key value]

Plain ``python train_latent.py`` works too, on one device. ``--resume latest`` goes on from the last checkpoint.
"""

from __future__ import annotations

from tarflow.cli.train import main

if __name__ == "__main__":
    main(prog="train_latent.py", description=__doc__)

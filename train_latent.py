"""Train a latent normalizing flow.

    python train_latent.py --config configs/quickstart_text.yaml [--section.key value]
    accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 8 train_latent.py --config …

The first is on one device, the second on several. ``--resume latest`` goes on from the last checkpoint.
"""

from __future__ import annotations

from tarflow.cli.train import main

if __name__ == "__main__":
    main(prog="train_latent.py", description=__doc__)

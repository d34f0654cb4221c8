"""The command `tarflow train-vae` as a script."""

from __future__ import annotations

from tarflow.cli.train_vae import main

if __name__ == "__main__":
    main()

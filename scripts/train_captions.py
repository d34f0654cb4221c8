"""The command `tarflow train-captions` as a script."""

from __future__ import annotations

from tarflow.cli.train_captions import main

if __name__ == "__main__":
    main()

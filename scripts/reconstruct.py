"""The command `tarflow reconstruct` as a script."""

from __future__ import annotations

from tarflow.cli.reconstruct import main

if __name__ == "__main__":
    main()

"""The command `tarflow benchmark` as a script."""

from __future__ import annotations

from tarflow.cli.benchmark import main

if __name__ == "__main__":
    main()

"""The command `tarflow sweep` as a script."""

from __future__ import annotations

from tarflow.cli.sweep import main

if __name__ == "__main__":
    main()

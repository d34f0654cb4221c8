"""The command `tarflow report` as a script."""

from __future__ import annotations

from tarflow.cli.report import main

if __name__ == "__main__":
    main()

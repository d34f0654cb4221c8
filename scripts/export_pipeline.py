"""The command `tarflow export` as a script."""

from __future__ import annotations

from tarflow.cli.export import main

if __name__ == "__main__":
    main()

"""The command `tarflow convert` as a script."""

from __future__ import annotations

from tarflow.cli.convert import main

if __name__ == "__main__":
    main()

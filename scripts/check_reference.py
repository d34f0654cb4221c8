"""The command `tarflow check-reference` as a script."""

from __future__ import annotations

from tarflow.cli.check_reference import main

if __name__ == "__main__":
    main()

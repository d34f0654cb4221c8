"""The command `tarflow exact-flow` as a script."""

from __future__ import annotations

from tarflow.cli.exact_flow import main

if __name__ == "__main__":
    main()

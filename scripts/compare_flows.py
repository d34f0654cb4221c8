"""The command `tarflow compare-flows` as a script."""

from __future__ import annotations

from tarflow.cli.compare_flows import main

if __name__ == "__main__":
    main()

"""The command `tarflow compare-peers` as a script."""

from __future__ import annotations

from tarflow.cli.compare_peers import main

if __name__ == "__main__":
    main()

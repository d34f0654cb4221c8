"""The command `tarflow compare-decoding` as a script."""

from __future__ import annotations

from tarflow.cli.compare_decoding import main

if __name__ == "__main__":
    main()

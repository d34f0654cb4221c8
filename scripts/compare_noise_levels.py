"""The command `tarflow compare-noise-levels` as a script."""

from __future__ import annotations

from tarflow.cli.compare_noise_levels import main

if __name__ == "__main__":
    main()

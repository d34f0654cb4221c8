"""The command `tarflow cache-latents` as a script."""

from __future__ import annotations

from tarflow.cli.cache_latents import main

if __name__ == "__main__":
    main()

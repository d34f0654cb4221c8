"""The command `tarflow gpu-check` as a script."""

from __future__ import annotations

from tarflow.cli.gpu_check import main

if __name__ == "__main__":
    main()

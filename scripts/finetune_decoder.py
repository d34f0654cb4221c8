"""The command `tarflow finetune-decoder` as a script."""

from __future__ import annotations

from tarflow.cli.finetune_decoder import main

if __name__ == "__main__":
    main()

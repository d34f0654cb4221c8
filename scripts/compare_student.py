"""The command `tarflow compare-student` as a script."""

from __future__ import annotations

from tarflow.cli.compare_student import main

if __name__ == "__main__":
    main()

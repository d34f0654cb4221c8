"""`tarflow check-reference`: this implementation beside what the published code computed."""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import CommandParser, loading
from tarflow.common.command import ending

DESCRIPTION = """Compare this implementation with what the published code computed.

  tarflow check-reference FOLDER …

Each folder has a published model, its arguments and tensors that the published code computed from it in float32; the
project's repository has some, and a README about them, in tests/reference. All are computed anew; a line each tells
the largest absolute error. The exit status is 1 if a sample is off by more than 1e-4, or anything else by more than
1e-5 of its largest value."""


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("tarflow check-reference", DESCRIPTION, "FOLDER …")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a reference folder")
    folders = parser.parse_args(argv).folders
    with ending():
        for folder in folders:
            if not Path(folder).is_dir():
                raise ValueError(f"there is no folder {folder!r}")
    loading()
    from tarflow.benchmarks.reference import check_folder

    failed = False
    for folder in folders:
        print(folder)
        with ending():
            comparisons = check_folder(folder)
        for comparison in comparisons:
            verdict = "ok" if comparison.passed else "FAILED"
            print(f"  {comparison.name:<44} {comparison.error:.1e}  (limit {comparison.limit:.1e})  {verdict}")
            failed |= not comparison.passed
        failed |= not comparisons
    raise SystemExit(int(failed))

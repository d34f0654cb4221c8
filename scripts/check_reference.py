"""Compare this implementation with what the published code computed.

    python -m tarflow.scripts.check_reference FOLDER …

Each folder has a published model, its arguments and tensors that the published code computed from it in float32; the
project's repository has some, and a README about them, in tests/reference. All are computed anew; a line each tells
the largest absolute error. The exit status is 1 if a sample is off by more than 1e-4, or anything else by more than
1e-5 of its largest value.
"""

from __future__ import annotations

import argparse

from tarflow.benchmarks.reference import check_folder
from tarflow.common.command import ending


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a reference folder")
    failed = False
    for folder in parser.parse_args(argv).folders:
        print(folder)
        with ending():
            comparisons = check_folder(folder)
        for comparison in comparisons:
            verdict = "ok" if comparison.passed else "FAILED"
            print(f"  {comparison.name:<44} {comparison.error:.1e}  (limit {comparison.limit:.1e})  {verdict}")
            failed |= not comparison.passed
        failed |= not comparisons
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()

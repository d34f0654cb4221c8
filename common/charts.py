"""Tables and charts of what was measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tarflow.common.files import replaced


def check_matplotlib() -> None:
    """Matplotlib is wanted at the end of long work: whether it is there is asked at the beginning.

    Raises:
        ValueError: if it is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed, which the plots need: pip install 'tarflow[evaluation]'")


@contextmanager
def figure(columns: int, title: str, path: Path, width: float = 4) -> Iterator[Any]:
    """Axes side by side, saved as a picture at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, columns, figsize=(width * columns, 3.4), squeeze=False)
    yield axes[0]
    drawing.suptitle(title, fontsize=8)
    drawing.tight_layout()
    with replaced(path) as temporary:
        drawing.savefig(temporary, dpi=120, format=path.suffix[1:].lower())
    pyplot.close(drawing)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], digits: str = ".4g") -> str:
    """A table of Markdown: text as it is, numbers that are not whole in a format, None as a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        return format(value, digits) if isinstance(value, float) else str(value)

    lines = [header, *([cell(value) for value in row] for row in rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Columns of even width: text to the left, numbers to the right with four digits, None as a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return str(value)

    lines = [header, *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [not rows or isinstance(value, str) for value in (rows[0] if rows else header)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if to_left else text.rjust(width)
            for text, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )

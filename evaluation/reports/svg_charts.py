"""Charts as inline SVG: sharp on paper, and coloured by the page's own style for light and dark.

The style has the classes c0, c1, … for marks and k0, k1, … for the keys of the legend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 46
#: Values beyond these quantiles do not widen the vertical axis: the first steps of a training would hide the rest.
LOWEST, HIGHEST = 0.5, 99.0
#: Curves are averaged to so many points.
POINTS = 300

Series = dict[str, tuple[Sequence[float], Sequence[float]]]


def line_chart(series: Series, xlabel: str, ylabel: str, description: str) -> str:
    """Curves by name, each of x and y; a single point is a dot.

    Args:
        description: what the chart shows, for those who cannot see it.
    """
    curves = {name: averaged(*points) for name, points in series.items()}
    xs = np.concatenate([x for x, _ in curves.values()])
    ys = np.concatenate([y for _, y in curves.values()])
    axes = Axes((float(xs.min()), float(xs.max())), tuple(np.percentile(ys, (LOWEST, HIGHEST))))
    marks = []
    for number, (x, y) in enumerate(curves.values()):
        points = [(axes.x(a), axes.y(b)) for a, b in zip(x, y, strict=True)]
        if len(points) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            marks.append(f'<polyline class="line c{number}" points="{path}"/>')
        if len(points) <= 12:
            marks += [f'<circle class="dot c{number}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in points]
    return axes.drawn(marks, list(series), xlabel, ylabel, description)


def histogram(groups: Mapping[str, Sequence[float]], xlabel: str, description: str, bins: int = 30) -> str:
    """Shares of each group's values over the same bins, with a dashed line at each mean."""
    values = {name: np.asarray(group, dtype=float) for name, group in groups.items()}
    every = np.concatenate(list(values.values()))
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    shares = {name: np.histogram(group, edges)[0] / len(group) for name, group in values.items()}
    axes = Axes((edges[0], edges[-1]), (0.0, max(float(share.max()) for share in shares.values())))
    marks = []
    for number, (name, share) in enumerate(shares.items()):
        corners = [(axes.x(edges[0]), axes.y(0))]
        for left, right, height in zip(edges[:-1], edges[1:], share, strict=True):
            corners += [(axes.x(left), axes.y(height)), (axes.x(right), axes.y(height))]
        corners.append((axes.x(edges[-1]), axes.y(0)))
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        mean = axes.x(float(values[name].mean()))
        marks.append(f'<polygon class="area c{number}" points="{path}"/>')
        marks.append(
            f'<line class="mean c{number}" x1="{mean:.1f}" x2="{mean:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
    return axes.drawn(marks, list(groups), xlabel, "share of pictures", description)


class Axes:
    """A frame with ticks, and where values lie in it.

    Args:
        xs, ys: lowest and highest value along each axis.
    """

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]):
        low, high = ys
        margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        self.xs = xs if xs[1] > xs[0] else (xs[0] - 1, xs[0] + 1)
        self.ys = (low if low == 0 else low - margin, high + margin)

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top; what is beyond the axis stays at its end."""
        part = (value - self.ys[0]) / (self.ys[1] - self.ys[0])
        return HEIGHT - BOTTOM - min(max(part, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)

    def drawn(self, marks: list[str], names: list[str], xlabel: str, ylabel: str, description: str) -> str:
        """The whole chart, with a legend if there are several names."""
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">',
            f"<title>{escape(description)}</title>",
        ]
        for tick in ticks(*self.ys):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{number(tick)}</text>')
        for tick in ticks(*self.xs):
            x = self.x(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{bottom + 17}">{number(tick)}</text>')
        parts += marks
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        middle = (LEFT + right) / 2
        parts.append(f'<text text-anchor="middle" x="{middle}" y="{HEIGHT - 8}">{escape(xlabel)}</text>')
        middle = (TOP + bottom) / 2
        turn = f"rotate(-90 14 {middle})"
        parts.append(f'<text text-anchor="middle" x="14" y="{middle}" transform="{turn}">{escape(ylabel)}</text>')
        return legend(names if len(names) > 1 else []) + "\n".join([*parts, "</svg>"])


def legend(names: list[str]) -> str:
    """Names beside their colours, as HTML, which wraps where there is no room."""
    keys = (f'<span><i class="k{index}"></i>{escape(name)}</span>' for index, name in enumerate(names))
    return f'<p class="legend">{"".join(keys)}</p>' if names else ""


def averaged(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points, means of neighbours; values that are not finite are left out."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    finite = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[finite], ys[finite]
    if len(xs) <= POINTS:
        return xs, ys
    parts = np.array_split(np.arange(len(xs)), POINTS)
    return np.array([xs[part].mean() for part in parts]), np.array([ys[part].mean() for part in parts])


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 10):g}"

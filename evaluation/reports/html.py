"""A report on a pipeline as one HTML file that needs nothing else: no network, no scripts, pictures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tarflow.common.files import check_writable, write_text
from tarflow.evaluation.likelihood.held_out import UNITS
from tarflow.evaluation.reports.contents import PIXELS, Contents, Likelihoods, gather
from tarflow.evaluation.reports.neighbours import PIXEL_SIDE, Neighbours
from tarflow.evaluation.reports.settings import ReportConfig
from tarflow.evaluation.reports.svg_charts import histogram, line_chart

#: Pictures are embedded with at most this side; smaller ones than the second without loss.
LARGEST_SIDE, LOSSLESS_SIDE = 256, 128
#: Samples whose distance is below this quantile of the reference distances are flagged.
SUSPICIOUS = 0.05

STYLE = """
:root { color-scheme: light dark; --text: #1c2126; --soft: #5b6670; --rule: #d5dade; --page: #fff; --box: #f5f6f7;
  --c0: #2c6fbb; --c1: #c4591c; --c2: #3b8a4f; --c3: #8a4f9e; --c4: #8b7a1d; --c5: #40838f; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e6e8; --soft: #a0a9b1; --rule: #3a4249; --page: #15191c;
  --box: #1e2327; --c0: #6aa7ea; --c1: #ee9057; --c2: #74c288; --c3: #c490d6; --c4: #cdbb5a; --c5: #7cc3d0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; color: var(--text); background: var(--page);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .85rem; }
figure { margin: 0; }
figcaption { line-height: 1.3; margin-top: .25rem; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--box); }
.samples { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.card { border: 1px solid var(--rule); border-radius: 6px; padding: .6rem; background: var(--box); }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: .5rem; padding: 3px; }
.row figure:first-child img { outline: 2px solid var(--c2); outline-offset: 1px; }
.card p { margin: 0 0 .4rem; font-size: .85rem; line-height: 1.3; }
.charts { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .4rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--rule); }
th { font-weight: 500; } td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
thead th { color: var(--soft); }
.settings { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.settings th { white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; margin: .3rem 0; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--text); font-size: 13px; font-family: inherit; } svg .tick { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--rule); stroke-width: 1; } svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.6; } svg .mean { stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .area { fill-opacity: .25; stroke-width: 1.4; }
@media print { body { max-width: none; padding: 0; font-size: .8rem; } h2 { break-after: avoid; }
  figure, .card, svg, tr { break-inside: avoid; } .samples { grid-template-columns: repeat(6, 1fr); }
  .cards { grid-template-columns: repeat(2, 1fr); } }
""" + "\n".join(
    f"svg .c{i} {{ stroke: var(--c{i}); }} svg .area.c{i}, svg .dot.c{i} {{ fill: var(--c{i}); }} .k{i} {{ background: var(--c{i}); }}"
    for i in range(6)
)


def write_report(config: ReportConfig, device: str | torch.device = "cpu") -> Path:
    """Make a report and write it, whole or not at all; returns the file.

    Raises:
        ValueError, OSError: if something that it needs is missing or does not fit.
    """
    path = Path(config.out).expanduser()
    check_writable(path)
    write_text(path, render(gather(config, device)))
    return path


def render(contents: Contents) -> str:
    """The whole page."""
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections = [samples_section(contents), neighbours_section(contents)]
    if contents.likelihoods is not None:
        sections.append(likelihood_section(contents.likelihoods))
    if contents.metrics:
        sections.append(metrics_section(contents))
    if contents.curves:
        sections.append(curves_section(contents))
    sections.append(settings_section(contents))
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(contents.title)}: report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>",
            f"<h1>{escape(contents.title)}</h1>",
            f'<p class="soft">Report of tarflow on a latent normalizing flow, {made}</p>\n</header>\n<main>',
            *sections,
            "</main>\n</body>\n</html>\n",
        ]
    )


def section(name: str, heading: str, *parts: str) -> str:
    return "\n".join([f'<section id="{name}">', f"<h2>{escape(heading)}</h2>", *parts, "</section>"])


def picture(pixels: Tensor, alt: str, caption: str = "") -> str:
    """A picture (3, H, W) uint8 inside the page, with its caption below."""
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=max(image.size) <= LOSSLESS_SIDE, quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="data:image/webp;base64,{data}" alt="{escape(alt)}" {size}>{below}</figure>'


def table(rows: Iterable[tuple[str, Any]]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(str(v))}</td></tr>' for k, v in rows)
    return f'<div class="wide"><table><tbody>{body}</tbody></table></div>'


def samples_section(contents: Contents) -> str:
    """The samples with what they were drawn from, none chosen."""
    figures = [
        picture(image, f"sample {i}: {text}" if text else f"sample {i}", text)
        for i, (image, text) in enumerate(zip(contents.images, contents.texts, strict=True))
    ]
    note = f"The first {len(figures)} samples of the seed; none were left out."
    return section("samples", "Samples", f"<p>{note}</p>", f'<div class="samples">{"".join(figures)}</div>')


def neighbours_section(contents: Contents) -> str:
    """Whether samples are copies: distances in each space against the yardsticks, and the nearest pairs."""
    groups = {"held-out": "held-out pictures", "train": "training pictures to others", "samples": "samples"}
    text = (
        f"For each sample, the nearest of {len(contents.train):,} training pictures. A model that copies has samples much "
        "nearer to training pictures than other pictures are: held-out ones, and training pictures to others among "
        "themselves. Held-out pictures may be of another kind than training pictures, if the data is split so."
    )
    parts = [f"<p>{text}</p>"]
    for space, found in contents.spaces.items():
        unit = "grey levels" if space == PIXELS else "distance"
        title = f"In {space}"
        if space == PIXELS:
            title += f", root mean square difference in grey levels at {PIXEL_SIDE} × {PIXEL_SIDE}"
        parts.append(f"<h3>{escape(title)}</h3>")
        names = {groups[group]: found[group].nearest for group in groups if group in found}
        parts.append(verdict(found, unit))
        chart = histogram(
            {name: values.tolist() for name, values in names.items()},
            f"distance to the nearest training picture{f', {unit}' if space == PIXELS else ''}",
            f"histogram of distances to the nearest training picture in {space}, for {', '.join(names)}",
        )
        rows = [(name, quantiles(values)) for name, values in names.items()]
        parts.append(f'<div class="charts"><div>{chart}</div><div>{distance_table(rows)}</div></div>')
        parts.append(nearest_pairs(contents, found["samples"]))
    return section("neighbours", "Nearest training pictures", *parts)


def verdict(found: dict[str, Neighbours], unit: str) -> str:
    """How many samples lie nearer to training pictures than nearly all pictures of each yardstick."""
    samples = found["samples"].nearest
    sentences = []
    for group, name in (("train", "training pictures are to others"), ("held-out", "held-out pictures are")):
        if group in found:
            limit = float(found[group].nearest.quantile(SUSPICIOUS))
            near = int((samples < limit).sum())
            sentences.append(
                f"{near} of {len(samples)} samples are nearer to a training picture than {1 - SUSPICIOUS:.0%} of the "
                f"{name} (limit {limit:.3g}); without copying, about {SUSPICIOUS * len(samples):.0f} would be."
            )
    smallest = f"The smallest distance of a sample is {float(samples.min()):.3g} {unit if unit != 'distance' else ''}"
    return f"<p>{escape(' '.join([*sentences, smallest.strip() + '.']))}</p>"


def quantiles(values: Tensor) -> list[float]:
    return [float(values.min()), *values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()]


def distance_table(rows: list[tuple[str, list[float]]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "smallest", "5 %", "median", "95 %"))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{value:.3g}</td>" for value in values)}</tr>'
        for name, values in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def nearest_pairs(contents: Contents, found: Neighbours) -> str:
    """The samples that lie nearest to training pictures, each with its neighbours."""
    cards = []
    for sample in found.nearest.argsort()[: contents.shown_neighbours].tolist():
        text = contents.texts[sample] or f"sample {sample}"
        figures = [picture(contents.images[sample], f"sample {sample}: {text}", "sample")]
        pairs = zip(found.distances[sample].tolist(), found.indices[sample].tolist(), strict=True)
        for rank, (distance, index) in enumerate(pairs, start=1):
            alt = f"training picture {contents.train.indices[index]}, neighbour {rank} of sample {sample}"
            figures.append(picture(contents.train[index]["image"], alt, f"{distance:.3g}"))
        cards.append(f'<div class="card"><p>{escape(text)}</p><div class="row">{"".join(figures)}</div></div>')
    note = f"The {len(cards)} samples nearest to a training picture, with their {found.indices.shape[1]} neighbours "
    return f"<p>{note}and the distances:</p><div class='cards'>{''.join(cards)}</div>"


def likelihood_section(likelihoods: Likelihoods) -> str:
    """Histograms of training and held-out pictures."""
    unit = UNITS[likelihoods.name]
    means = []
    for group, values in likelihoods.values.items():
        mean, error = likelihoods.summary(group)
        means.append((f"{group} pictures ({len(values)})", f"{mean:.4f} ± {error:.4f}"))
    text = f"Negative log-likelihood in {unit}; less is more likely. Means with their standard errors:"
    more = "A model that has learned its training pictures by heart gives them a much better likelihood than others."
    groups = {f"{group} pictures": values.tolist() for group, values in likelihoods.values.items()}
    chart = histogram(groups, unit, f"histogram of likelihoods in {unit}, for {' and '.join(groups)}")
    body = f'<div class="charts"><div>{chart}</div><div>{table(means)}<p class="soft">{more}</p></div></div>'
    return section("likelihood", "Likelihood", f"<p>{text}</p>", body)


def metrics_section(contents: Contents) -> str:
    warnings = "".join(f"<p>Warning: {escape(warning)}</p>" for warning in contents.warnings)
    return section("metrics", "Metrics", table(contents.metrics.items()), warnings)


def curves_section(contents: Contents) -> str:
    charts = [
        f"<div><h3>{escape(title)}</h3>{line_chart(series, 'step', title, f'curve of {title} against the step')}</div>"
        for title, series in contents.curves.items()
    ]
    note = "Curves are averaged to 300 points; the first steps may lie outside the axis."
    return section("curves", "Training", f"<p>{note}</p>", f'<div class="charts">{"".join(charts)}</div>')


def settings_section(contents: Contents) -> str:
    tables = [f"<div><h3>{escape(name)}</h3>{table(rows.items())}</div>" for name, rows in contents.settings.items()]
    return section("settings", "Settings and versions", f'<div class="settings">{"".join(tables)}</div>')

"""The report: one file that needs nothing else, with every section, and a page that a browser shows."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline
from torch.utils.tensorboard import SummaryWriter

from tarflow.data.config import DataConfig
from tarflow.data.images import Images, collate
from tarflow.data.subset import Subset, evenly, spread
from tarflow.evaluation.features import extractors
from tarflow.evaluation.features.extractors import Extractor
from tarflow.evaluation.reports.files import read_curves
from tarflow.evaluation.reports.html import write_report
from tarflow.evaluation.reports.neighbours import nearest_neighbours, pixel_description
from tarflow.evaluation.reports.settings import ReportConfig
from tarflow.evaluation.reports.svg_charts import averaged, histogram, line_chart, ticks

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
SMALL = {"samples": 5, "batch_size": 4, "train_images": 40, "yardstick_images": 8, "likelihood_images": 6}


class Page(HTMLParser):
    """What the tests want to know about a page; fails at elements that are not closed in order."""

    VOID = ("meta", "img", "br", "circle", "line", "polyline", "polygon", "rect")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.images: list[dict[str, str | None]] = []
        self.charts: list[str | None] = []
        self.links: list[str | None] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.add(tag)
        self.links += [values[name] for name in ("src", "href", "data", "srcset", "action") if name in values]
        if tag == "section":
            self.sections.append(values["id"] or "")
        if tag == "img":
            self.images.append(values)
        if tag == "svg":
            self.charts.append(values["aria-label"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append((self.open[-1], data))


def config_of(pipeline: Path, file: Path, **options: Any) -> ReportConfig:
    return ReportConfig(
        **{"pipeline": str(pipeline), "data": DataConfig(image_size=32), "out": str(file), **SMALL, **options}
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it, on a small model of captions."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("report")
    make_pipeline("prefix").save_pretrained(folder / "pipeline")
    with SummaryWriter(str(folder / "run" / "logs")) as writer:
        for step in range(20):
            writer.add_scalar("train/nats_per_dim", 1 / (step + 1), step)
            writer.add_scalar("train/lr", 1e-3, step)
        writer.add_scalar("held_out/latent_nats_per_dim", 0.2, 19)
    metrics = {"metrics": {"fid": 12.345678}, "names": {"fid": "FID"}, "warnings": ["5 pictures are too few"]}
    metrics["samples"] = {"count": 5}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    patch = pytest.MonkeyPatch()
    extractor = Extractor("flat", torch.nn.Sequential(ToFloat(), torch.nn.Flatten()), "none", "none")
    patch.setattr(extractors, "load_extractor", lambda *_: extractor)
    options = {"run": str(folder / "run"), "metrics": str(folder / "metrics.json"), "extractor": "flat"}
    path = write_report(config_of(folder / "pipeline", folder / "report.html", title="<b>A & B</b>", **options))
    patch.undo()
    return path


class ToFloat(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4)


def test_the_file_has_all_sections_and_needs_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert page.sections == ["samples", "neighbours", "likelihood", "metrics", "curves", "settings"]
    assert all(link.startswith("data:image/webp;base64,") for link in page.links)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert report.stat().st_size < 2**20
    assert not list(report.parent.glob("*.tmp"))


def test_it_can_be_read_without_seeing_it(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    assert page.headings[0] == ("h1", "<b>A & B</b>")
    assert [name for level, name in page.headings if level == "h2"] == [
        *("Samples", "Nearest training pictures", "Likelihood", "Metrics", "Training", "Settings and versions")
    ]
    assert len(page.images) == 5 + 2 * 5 * 4  # samples; in two spaces, each with three neighbours
    assert all(image["alt"] and image["width"] == "32" for image in page.images)
    assert page.images[0]["alt"].startswith("sample 0: a ")
    assert len(page.charts) == 2 + 1 + 2
    assert "histogram of likelihoods in nats per latent dimension" in page.charts[2]


def test_numbers_and_settings_are_there(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    for wanted in ("12.346", "5 pictures are too few", "TARFlowModel", "layers_per_block"):
        assert wanted in text
    assert "nearest of 40 training pictures" in text
    assert torch.__version__.split("+")[0] in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_it(report: Path, tmp_path: Path) -> None:
    for name, width in (("wide", 1200), ("phone", 500)):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600", "--hide-scrollbars"]
        command += [f"--screenshot={tmp_path / name}.png", report.as_uri()]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"), dtype=int)
        assert pixels.shape[1] == width
        colours = pixels.reshape(-1, 3)
        background = np.median(colours, axis=0)
        painted = (np.abs(pixels - background).max(2) > 20).mean(1)  # of each row of pixels
        assert painted.mean() > 0.03
        assert (painted > 0).mean() > 0.4
        assert (np.ptp(colours, axis=1) > 60).mean() > 0.002, "no colours: the samples are not shown"


def test_class_labels_without_captions_logs_and_likelihoods(tmp_path: Path) -> None:
    make_pipeline("class_prefix").save_pretrained(tmp_path / "pipeline")
    for i in range(9):
        folder = tmp_path / "pictures" / f"class {i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    data = DataConfig(source="folder", path=str(tmp_path / "pictures"), image_size=32, validation_fraction=0)
    options = {"data": data, "likelihood_images": 0, "samples": 3}
    path = write_report(config_of(tmp_path / "pipeline", tmp_path / "a" / "report.html", **options))
    page = Page(path.read_text(encoding="utf-8"))
    assert page.sections == ["samples", "neighbours", "settings"]
    assert [image["alt"] for image in page.images[:3]] == ["sample 0: tench", "sample 1: church", "sample 2: gas pump"]


def test_classes_of_data_that_has_captions_too(tmp_path: Path) -> None:
    make_pipeline("class_prefix").save_pretrained(tmp_path / "pipeline")
    path = write_report(config_of(tmp_path / "pipeline", tmp_path / "report.html", likelihood_images=0, samples=3))
    page = Page(path.read_text(encoding="utf-8"))
    assert [image["alt"] for image in page.images[:3]] == ["sample 0: tench", "sample 1: church", "sample 2: gas pump"]


def test_copies_are_found_and_training_pictures_do_not_find_themselves() -> None:
    images = Subset(Images(DataConfig(image_size=32)), range(20))
    own = torch.tensor([0, 5, 9, 19])
    pictures = collate([images[i] for i in own.tolist()])["image"]
    queries, spaces = {"samples": pictures, "train": pictures}, {"pixels": pixel_description}
    found = nearest_neighbours(queries, images, spaces, {"train": own}, 3, 7)["pixels"]
    copies, others = found["samples"], found["train"]
    assert torch.equal(copies.indices[:, 0], own)
    assert copies.nearest.max() == 0
    assert others.nearest.min() > 1
    assert torch.equal(copies.indices[:, 1:], others.indices[:, :2])
    shifted = pixel_description(pictures) - pixel_description(pictures.clamp(max=250) + 1)
    assert shifted.norm(dim=1).max() <= 1.001  # one grey level


def test_folders_sorted_by_class_are_searched_evenly(tmp_path: Path) -> None:
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    images = Images(DataConfig(source="folder", path=str(tmp_path), image_size=8, validation_fraction=0))
    assert [int(item["image"][0, 0, 0]) for item in map(spread(images, 4).__getitem__, range(4))] == [0, 3, 6, 9]
    assert len(spread(images, 100)) == 12
    assert list(spread(Images(DataConfig(image_size=8)), 3).indices) == [0, 1, 2]
    assert evenly(5, 5) == [0, 1, 2, 3, 4]


def test_charts_of_little_data() -> None:
    for chart in (
        line_chart({"a": ([0, 1], [2.0, 2.0]), "b": ([1], [3.0])}, "x", "<y>", "a & b"),
        line_chart({"a": ([5], [0.0])}, "x", "y", "one"),
        histogram({"a": [1.0, 1.0], "b": [1.0]}, "x", "constant"),
    ):
        page = Page(chart)
        assert len(page.charts) == 1
        assert "nan" not in chart
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    x, y = averaged(range(1000), [float("nan"), *range(999)])
    assert len(x) == len(y) == 300


def test_curves_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as log:
        for step, (loss, norm) in enumerate([(1.0, float("nan")), (float("inf"), float("nan")), (2.0, float("nan"))]):
            log.add_scalar("loss", loss, step)
            log.add_scalar("norm", norm, step)
    assert read_curves(str(tmp_path)) == {"loss": {"loss": ([0, 2], [1.0, 2.0])}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"train_images": 3}, "train_images must be at least 4"),
        ({"extractor_weights": "x"}, "but no extractor"),
        ({"out": "report.pdf"}, r"must be the name of an \.html file"),
        ({"run": "absent"}, "'absent' has no TensorBoard logs with scalars"),
        ({"metrics": "absent.json"}, r"'absent\.json' is no JSON file of metrics"),
    ],
)
def test_bad_input(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_report(config_of(tmp_path, tmp_path / "report.html", **options))

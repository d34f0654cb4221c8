"""The comparison of flows: its data, its small loop, results that are kept, tables and pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tarflow.data.drawing_checker import class_shares
from tarflow.data.drawings import CLASS_NAMES, Drawings
from tarflow.experiments.family import comparison as flow_comparison
from tarflow.experiments.family import plane as flow_plane
from tarflow.experiments.family.comparison import compare_flows, markdown
from tarflow.experiments.family.data import PLANES, Samples, as_tensor, plane_samples, points
from tarflow.experiments.family.family import FAMILY, draw, drawing_speed, fit, held_out_nats
from tarflow.experiments.family.images import DIGITS, DISTILLED, as_pixels, digit_run, labelled_batches, uniform
from tarflow.experiments.family.runs import Runs, file_name
from tarflow.experiments.family.settings import FlowComparison
from tarflow.flows.model import TARFlowModel

TINY = {"width": 32, "head_dim": 32}


def test_points_lie_where_they_should() -> None:
    board = points("checkerboard", 2000, 0).view(-1, 2)
    assert board.abs().max() <= 2
    assert ((board.floor().sum(1) % 2) == 0).all()
    spirals = points("spirals", 2000, 0).view(-1, 2)
    assert 2 < spirals.norm(dim=1).max() < 2.6
    assert torch.equal(points("spirals", 5, 3), points("spirals", 5, 3))
    assert not torch.equal(points("spirals", 5, 3), points("spirals", 5, 4))
    with pytest.raises(ValueError, match="must be one of spirals, checkerboard, got 'moons'"):
        points("moons", 5, 0)


def test_the_family_has_one_budget() -> None:
    counts = {
        name: sum(parameter.numel() for parameter in TARFlowModel(**DIGITS, **flow).parameters())
        for name, flow in FAMILY.items()
    }
    assert max(counts.values()) < 1.03 * min(counts.values()), counts


@pytest.mark.parametrize("name", ["RealNVP", "TARFlow"])
def test_a_short_training_learns(name: str) -> None:
    torch.manual_seed(0)
    model = TARFlowModel(**{**flow_plane.SHAPE, **FAMILY[name]})
    samples = plane_samples("checkerboard", 2000)
    before, _ = held_out_nats(model, samples.held_out[:500], None)
    numbers = fit(model, flow_plane.batches_of(samples), 25, 64, 3e-3)
    after, error = held_out_nats(model, samples.held_out[:500], None)
    assert after < before - 0.02
    assert 0 < error < 0.1
    assert numbers["images_per_second"] > 0
    assert draw(model, 10, shape=(1, 1, 2)).shape == (10, 1, 1, 2)
    assert drawing_speed(model, 10, shape=(1, 1, 2)) > 0


def test_a_loss_that_is_not_finite_stops() -> None:
    model = TARFlowModel(**flow_plane.SHAPE, layers_per_block=[1])
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        fit(model, lambda generator, size: (torch.full((size, 1, 1, 2), torch.nan), None), 2, 4)


def test_runs_are_kept_by_their_settings(tmp_path: Path) -> None:
    runs, made = Runs(tmp_path / "runs"), []

    def make() -> Any:
        made.append(1)
        return {"nats": 1.5}, {"x": torch.ones(2)}

    for steps in (1, 1, 2, 2):
        numbers, tensors = runs.get(file_name("σ 0.3, α"), {"steps": steps, "shape": (1, 2)}, make)
        assert numbers == {"nats": 1.5}
        assert torch.equal(tensors["x"], torch.ones(2))
    assert len(made) == 2
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == ["σ_0_3_α.json", "σ_0_3_α.pt"]


def test_labelled_batches_drop_some_labels() -> None:
    samples = Samples(torch.zeros(50, 1, 8, 8), torch.zeros(5, 1, 8, 8), torch.arange(50) % 10, torch.zeros(5).long())
    x, labels = labelled_batches(samples, 10, uniform)(torch.Generator().manual_seed(0), 400)
    assert -1 <= x.min() < x.max() < -1 + 2 / 17
    assert 0.05 < float((labels == 10).double().mean()) < 0.16
    assert torch.equal(
        as_pixels(uniform(torch.full((1, 1, 8, 8), 16.0), torch.Generator()), None), torch.full((1, 1, 8, 8), 16.0)
    )
    assert as_pixels(torch.tensor([-1.4, -1.0, 1.0, 3.0]), 0.3).tolist() == [0, 0, 16, 16]


class AlwaysThree:
    """Reads all digits as a three."""

    def accuracy(self, pixels: torch.Tensor, labels: torch.Tensor) -> float:
        assert pixels.shape == (len(labels), 1, 8, 8)
        return float((labels == 3).double().mean())


def test_a_digit_run_measures_what_the_tables_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow.experiments.family.images.SAMPLES", 20)
    images = torch.randint(0, 17, (40, 1, 8, 8)).float()
    samples = Samples(images[:30], images[30:], torch.arange(30) % 10, torch.arange(10))
    arguments = {**DIGITS, **TINY, "layers_per_block": [1, 1]}
    numbers, tensors = digit_run(arguments, None, samples, AlwaysThree(), 2, 0, None)
    assert numbers["bits"] == pytest.approx((numbers["nats"] + math.log(8.5)) / math.log(2))
    assert numbers["accuracy"] == pytest.approx(0.1)
    noisy, _ = digit_run(arguments, 0.3, samples, AlwaysThree(), 2, 0, None)
    assert "bits" not in noisy and noisy["denoised_accuracy"] == pytest.approx(0.1)
    teacher = TARFlowModel(**arguments)
    teacher.load_state_dict(tensors["state"])
    student = {**arguments, "block": "inverse_autoregressive"}
    distilled, _ = digit_run(student, None, samples, AlwaysThree(), 2, 0, teacher.eval())
    assert math.isfinite(distilled["divergence"])


def test_drawings_are_read_back() -> None:
    items = [Drawings("train", 64, length=9)[index] for index in range(9)]
    pictures, labels = (
        torch.stack([as_tensor(item["image"]) for item in items]),
        torch.tensor([i["label"] for i in items]),
    )
    pictures, labels = pictures.permute(0, 2, 3, 1).numpy(), labels.tolist()
    assert class_shares(pictures, labels) == {"shape": 1.0, "colour": 1.0, "all": 1.0}
    wrong = class_shares(pictures, [(label + 7) % len(CLASS_NAMES) for label in labels])
    assert wrong["colour"] < 0.5 and wrong["all"] <= min(wrong["colour"], wrong["shape"])
    with pytest.raises(ValueError, match="the label 36 is no class"):
        class_shares(pictures[:1], [36])


def test_plane_part_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"RealNVP": {**FAMILY["RealNVP"], "layers_per_block": [1, 1]}, "TARFlow": {"layers_per_block": [1]}}
    for module in (flow_plane, flow_comparison):
        monkeypatch.setattr(module, "FAMILY", few)
        monkeypatch.setattr(module, "OUTSIDE", ())
    for module, name in ((flow_plane, "ABLATIONS"), (flow_comparison, "PLANE_ABLATIONS")):
        monkeypatch.setattr(module, name, {"TARFlow, additive": {"layers_per_block": [1], "scale": "additive"}})
    monkeypatch.setattr(flow_plane, "PIXELS", 20)
    monkeypatch.setitem(flow_comparison.QUICK, "plane", 2)
    config = FlowComparison(output=str(tmp_path), parts=("plane",), quick=True)
    text = compare_flows(config).read_text(encoding="utf-8")
    assert "| RealNVP |" in text and "spirals, nats per number" in text
    for name in ("flows_plane.png", "flows_blocks.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 200
    monkeypatch.setattr(flow_plane, "plane_run", None)  # nothing is trained again
    assert compare_flows(config).read_text(encoding="utf-8") == text
    names = sorted(path.name for path in (tmp_path / "runs").glob("*.json"))
    assert len(names) == len(PLANES) * 2 + 1
    assert json.loads((tmp_path / "runs" / names[0]).read_text())["settings"]["steps"] == 2


def test_tables() -> None:
    assert markdown(["a", "b"], [["x", None], [1234, 0.12345], [1234.5, "7 %"]]).splitlines()[2:] == [
        "| x | – |",
        "| 1,234 | 0.123 |",
        "| 1,234 | 7 % |",
    ]
    with pytest.raises(ValueError, match="a part must be one of plane, digits, latents, memory, got 'all'"):
        FlowComparison(parts=("all",))


def test_distilled_has_the_teachers_shape() -> None:
    assert FAMILY["IAF"]["layers_per_block"] == FAMILY["TARFlow"]["layers_per_block"]
    assert DISTILLED not in FAMILY

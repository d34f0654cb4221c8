"""Flows on densities of the plane, with pictures of the density and of how noise is warped into it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tarflow.common.statistics import mean_and_error
from tarflow.experiments.family.data import PLANES, Samples, plane_samples
from tarflow.experiments.family.family import FAMILY, draw, drawing_speed, fit, held_out_nats
from tarflow.experiments.family.runs import Result, Runs, file_name
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.likelihood import log_prob
from tarflow.flows.model import TARFlowModel

SHAPE: dict[str, Any] = {
    "in_channels": 1,
    "sample_size": 2,
    "patch_size": 1,
    "width": 32,
    "head_dim": 16,
    "positions": "rotary_1d",
}
#: The same budget in fewer blocks, and without a scale.
ABLATIONS: dict[str, dict[str, Any]] = {
    "TARFlow, 1 block": {"layers_per_block": [8]},
    "TARFlow, 2 blocks": {"layers_per_block": [4, 4]},
    "TARFlow, 3 blocks": {"layers_per_block": [3, 3, 2]},
    "TARFlow, additive": {"layers_per_block": [2] * 4, "scale": "additive"},
}
ABLATED = "spirals"
#: Flows of the zuko library, if it is there: about as many parameters.
OUTSIDE = ("MAF (zuko)", "NSF (zuko)")
#: Half the side of the pictures of densities, their pixels, and the lines of the warped grid with their points.
EXTENT, PIXELS, LINES, POINTS = 2.6, 100, 13, 80
BATCH, LEARNING_RATE = 128, 3e-3


def plane_results(runs: Runs, steps: int, seed: int = 0) -> dict[str, dict[str, Result]]:
    """Results by density and flow: ``nats`` (per number, held out), its ``error``, ``parameters``, speeds; tensors
    ``density`` (PIXELS, PIXELS), ``lines`` (2·LINES, POINTS, 2) and ``samples`` (N, 2)."""
    names = [*FAMILY]
    try:
        import zuko  # noqa: F401

        names += OUTSIDE
    except ModuleNotFoundError:
        print("zuko is not installed, so its flows are left out: pip install 'tarflow[family]'")
    results: dict[str, dict[str, Result]] = {}
    for density in PLANES:
        samples = plane_samples(density)
        results[density] = {}
        for name in [*names, *(ABLATIONS if density == ABLATED else ())]:
            settings = {"shape": SHAPE, "flow": {**FAMILY, **ABLATIONS}.get(name, name), "steps": steps, "seed": seed}
            results[density][name] = runs.get(
                f"plane_{density}_{file_name(name)}",
                {**settings, "batch": BATCH, "lr": LEARNING_RATE},
                partial(any_run, name, samples, steps, seed),
            )
    return results


def picture_points() -> Tensor:
    """Centres of the pixels of a density's picture, (PIXELS², 1, 1, 2), the top row first."""
    axis = (torch.arange(PIXELS) + 0.5) / PIXELS * 2 * EXTENT - EXTENT
    rows, columns = torch.meshgrid(-axis, axis, indexing="ij")
    return torch.stack([columns, rows], -1).view(-1, 1, 1, 2)


def grid_lines() -> Tensor:
    """Lines of a square grid of noise, (2·LINES·POINTS, 1, 1, 2)."""
    at, along = torch.linspace(-2.4, 2.4, LINES), torch.linspace(-2.4, 2.4, POINTS)
    one, other = torch.meshgrid(at, along, indexing="ij")
    return torch.cat([torch.stack([one, other], -1), torch.stack([other, one], -1)]).view(-1, 1, 1, 2)


def batches_of(samples: Samples) -> Any:
    def batches(generator: torch.Generator, size: int) -> tuple[Tensor, None]:
        return samples.train[torch.randint(len(samples.train), (size,), generator=generator)], None

    return batches


def any_run(name: str, samples: Samples, steps: int, seed: int) -> Result:
    """Train one of ours or of another library, and look at it."""
    return (outside_run if name in OUTSIDE else plane_run)(name, samples, steps, seed)


def plane_run(name: str, samples: Samples, steps: int, seed: int) -> Result:
    """Train one of ours and look at it."""
    torch.manual_seed(seed)
    model = TARFlowModel(**SHAPE, **{**FAMILY, **ABLATIONS}[name])
    numbers = fit(model, batches_of(samples), steps, BATCH, LEARNING_RATE, seed=seed)
    model.eval()
    numbers["nats"], numbers["error"] = held_out_nats(model, samples.held_out, None)
    made = draw(model, 2000, shape=(1, 1, 2))
    numbers["samples_per_second"] = drawing_speed(model, 2000, shape=(1, 1, 2))
    numbers["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        density = log_prob(model, picture_points()).exp().view(PIXELS, PIXELS)
        lines = generate(model, grid_lines())[0].view(2 * LINES, POINTS, 2)
    return numbers, {"density": density, "lines": lines, "samples": made.view(-1, 2)}


def outside_run(name: str, samples: Samples, steps: int, seed: int) -> Result:
    """The same with a flow of the zuko library."""
    import zuko

    torch.manual_seed(seed)
    kind = zuko.flows.NSF if name.startswith("NSF") else zuko.flows.MAF
    flow = kind(2, transforms=4, hidden_features=(128, 128))

    def loss(model: Any, x: Tensor, labels: Tensor | None) -> Tensor:
        return -model().log_prob(x.flatten(1)).mean() / 2

    numbers = fit(flow, batches_of(samples), steps, BATCH, LEARNING_RATE, loss, seed)
    with torch.no_grad():
        values = -flow().log_prob(samples.held_out.flatten(1)) / 2
        numbers["nats"], numbers["error"] = mean_and_error(values)
        density = flow().log_prob(picture_points().flatten(1)).exp().view(PIXELS, PIXELS)
        lines = flow().transform.inv(grid_lines().flatten(1)).view(2 * LINES, POINTS, 2)
        made = flow().sample((2000,))
    numbers["parameters"] = sum(parameter.numel() for parameter in flow.parameters())
    return numbers, {"density": density, "lines": lines, "samples": made}

"""Flows on the latents of the project's drawings, which a checker reads back from the decoded samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tarflow.data.drawing_checker import class_shares
from tarflow.data.drawings import CLASS_NAMES
from tarflow.data.images import to_uint8
from tarflow.experiments.family.data import Samples, drawing_samples
from tarflow.experiments.family.family import FAMILY, draw
from tarflow.experiments.family.images import BATCH, DISTILLED, LEARNING_RATE, gaussian, labelled_batches, labelled_run
from tarflow.experiments.family.runs import Result, Runs, file_name
from tarflow.flows.denoising import score_denoise
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.model import TARFlowModel

LATENTS: dict[str, Any] = {
    "in_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
    "width": 96,
    "head_dim": 32,
    "conditioning": "class_prefix",
    "num_classes": len(CLASS_NAMES),
}
#: IAF's likelihood goes token after token, so there it is distilled alone.
NAMES = [*(name for name in FAMILY if name != "IAF"), DISTILLED]
NOISE, ROUNDS, GUIDANCE = 0.2, 4, Guidance(1.0)


def latent_results(runs: Runs, steps: int, pictures: int, seed: int = 0) -> dict[str, Result]:
    """Results by flow, as of `labelled_run`; also shares of decoded samples whose ``colour`` and ``shape`` are their
    class's, and the same of ``guided`` ones, but for IAF, which takes no guidance; tensors ``samples`` and ``guided``
    (N, 3, 64, 64) uint8, after the score step, and ``state``."""
    found: list[Samples] = []  # made only if a run needs it

    def samples() -> Samples:
        if not found:
            found.append(drawing_samples(pictures))
        return found[0]

    results: dict[str, Result] = {}
    for name in NAMES:
        teacher, arguments = None, {**LATENTS, **FAMILY["IAF" if name == DISTILLED else name]}
        if name == DISTILLED:
            teacher = TARFlowModel(**LATENTS, **FAMILY["TARFlow"]).eval()
            teacher.load_state_dict(results["TARFlow"][1]["state"])
        settings = {"arguments": arguments, "noise": NOISE, "distilled": name == DISTILLED, "steps": steps}
        results[name] = runs.get(
            "latents_" + file_name(name),
            {**settings, "seed": seed, "batch": BATCH, "lr": LEARNING_RATE, "pictures": pictures},
            partial(latent_run_of, samples, arguments, steps, seed, teacher),
        )
    return results


def latent_run_of(
    samples: Callable[[], Samples], arguments: dict[str, Any], steps: int, seed: int, teacher: TARFlowModel | None
) -> Result:
    """`latent_run` of pictures that are read only if they are needed."""
    return latent_run(arguments, samples(), steps, seed, teacher)


def latent_run(
    arguments: dict[str, Any], samples: Samples, steps: int, seed: int, teacher: TARFlowModel | None
) -> Result:
    """One flow of latents; see `latent_results`."""
    add_noise, generator = gaussian(NOISE), torch.Generator().manual_seed(seed + 1)
    held_out = add_noise(samples.held_out, generator), samples.labels()[1]
    batches = labelled_batches(samples, arguments["num_classes"], add_noise)
    numbers, model = labelled_run(arguments, batches, held_out, steps, seed, teacher)
    labels = torch.arange(ROUNDS * model.null_label) % model.null_label
    tensors: dict[str, Any] = {"state": model.state_dict()}
    ways: dict[str, Guidance | None] = {"samples": None}
    if arguments.get("block") != "inverse_autoregressive":
        ways["guided"] = GUIDANCE
    for way, guidance in ways.items():
        made = draw(model, len(labels), labels, guidance=guidance)
        latents = score_denoise(model, made, NOISE, class_labels=labels)
        with torch.no_grad():
            tensors[way] = to_uint8(torch.cat([samples.codec.decode(part) for part in latents.split(32)]))
        prefix = "" if guidance is None else "guided_"
        shares = class_shares(tensors[way].permute(0, 2, 3, 1).numpy(), labels.tolist())
        numbers |= {f"{prefix}{what}": shares[what] for what in ("colour", "shape")}
    return numbers, tensors

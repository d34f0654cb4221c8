"""Flows on pictures with classes: scikit-learn's digits as pixels, the project's drawings as latents.

Shapes: N samples, C channels, H × W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tarflow.experiments.family.data import LEVELS, Samples, digit_samples
from tarflow.experiments.family.family import FAMILY, Batches, draw, drawing_speed, fit, held_out_nats, nll
from tarflow.experiments.family.runs import Result, Runs, file_name
from tarflow.flows.denoising import score_denoise
from tarflow.flows.distillation import distillation_loss, sample_divergence
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.model import TARFlowModel

DIGITS: dict[str, Any] = {
    "in_channels": 1,
    "sample_size": 8,
    "patch_size": 2,
    "width": 64,
    "head_dim": 32,
    "conditioning": "class_prefix",
    "num_classes": 10,
}
#: Of TARFlow, one setting at a time; ``noise`` is the deviation of Gaussian noise instead of uniform dequantisation.
ABLATIONS: dict[str, dict[str, Any]] = {
    "patch 1": {"patch_size": 1},
    "patch 4": {"patch_size": 4},
    "additive": {"scale": "additive"},
    "noise 0.05": {"noise": 0.05},
    "noise 0.3": {"noise": 0.3},
}
#: Of the ablations, those that the quick form leaves out: four times the tokens, four times the time.
SLOW_ABLATIONS = ("patch 1",)
#: Ways to draw from one TARFlow, beside the plain one.
DRAWINGS: dict[str, dict[str, Any]] = {
    "guidance, Gaussian": {"guidance": Guidance(1.0, "gaussian")},
    "guidance, linear": {"guidance": Guidance(1.0, "linear")},
    "guidance, annealed": {"guidance": Guidance(1.0, "linear", annealed=True)},
    "temperature 0.8": {"temperature": 0.8},
}
DISTILLED = "IAF, distilled"
BATCH, LEARNING_RATE, DROP_RATE, SAMPLES = 64, 4e-3, 0.1, 500


def labelled_batches(samples: Samples, null_label: int, add_noise: Callable[[Tensor, torch.Generator], Tensor]) -> Any:
    """Batches of noisy data with labels, of which a tenth is replaced by "no class"."""
    train_labels, _ = samples.labels()

    def batches(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        indices = torch.randint(len(samples.train), (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < DROP_RATE
        labels = train_labels[indices].masked_fill(dropped, null_label)
        return add_noise(samples.train[indices], generator), labels

    return batches


def gaussian(deviation: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Adds Gaussian noise of a standard deviation."""
    return lambda x, generator: x + deviation * torch.randn(x.shape, generator=generator)


def uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """Dequantises pixels 0 … 16 to [−1, 1]."""
    return (x + torch.rand(x.shape, generator=generator)) / LEVELS * 2 - 1


def labelled_run(
    arguments: dict[str, Any],
    batches: Batches,
    held_out: tuple[Tensor, Tensor],
    steps: int,
    seed: int,
    teacher: TARFlowModel | None = None,
) -> tuple[dict[str, Any], TARFlowModel]:
    """Train a model, or distil it from a teacher, and measure it: ``nats`` of held-out data with the ``error``,
    ``parameters``, speeds, and the ``divergence`` from a teacher in nats per number."""
    torch.manual_seed(seed)
    model = TARFlowModel(**arguments)
    loss = nll if teacher is None else lambda model, x, labels: distillation_loss(teacher, model, x, labels)
    numbers = fit(model, batches, steps, BATCH, LEARNING_RATE, loss, seed)
    model.eval()
    numbers["nats"], numbers["error"] = held_out_nats(model, *held_out)
    numbers["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    numbers["single_samples_per_second"] = drawing_speed(model, 1, torch.zeros(1).long())
    numbers["samples_per_second"] = drawing_speed(model, 100, torch.arange(100) % model.null_label)
    if teacher is not None:
        z = torch.randn(held_out[0].shape, generator=torch.Generator().manual_seed(seed))
        numbers["divergence"] = float(sample_divergence(teacher, model, z, held_out[1]).mean()) / z[0].numel()
    return numbers, model


class DigitReader:
    """A support vector classifier of digits, trained on the training pictures."""

    def __init__(self, samples: Samples):
        from sklearn.svm import SVC

        self.classifier = SVC(gamma=0.001).fit(samples.train.flatten(1).numpy(), samples.labels()[0].numpy())

    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Share of pictures (N, 1, 8, 8) with values 0 … 16 that are read as their labels."""
        found = self.classifier.predict(pixels.flatten(1).numpy())
        return float((torch.from_numpy(found) == labels).double().mean())


def as_pixels(x: Tensor, noise: float | None) -> Tensor:
    """Samples as values 0 … 16; ``noise`` as in `ABLATIONS`, None for dequantised pixels."""
    values = ((x + 1) / 2 * LEVELS).floor() if noise is None else ((x + 1) / 2 * (LEVELS - 1)).round()
    return values.clamp(0, LEVELS - 1)


def digit_results(runs: Runs, steps: int, seed: int = 0, left_out: tuple[str, ...] = ()) -> dict[str, Result]:
    """Results by flow or ablation (but those ``left_out``), as of `labelled_run`; also ``bits`` per dimension (of
    dequantised pixels), and ``accuracy`` of samples and ``denoised_accuracy`` as `DigitReader` has it; tensors
    ``samples`` (SAMPLES, 1, 8, 8), ``denoised``, ``state``. Of TARFlow also ``accuracies`` and tensors ``drawings`` by
    the names of `DRAWINGS`."""
    samples = digit_samples()
    reader = DigitReader(samples)
    print(f"held-out digits read rightly: {reader.accuracy(samples.held_out, samples.labels()[1]):.1%}")
    results: dict[str, Result] = {}
    ablations = {name: ablation for name, ablation in ABLATIONS.items() if name not in left_out}
    for name, flow in {**FAMILY, DISTILLED: FAMILY["IAF"], **ablations}.items():
        arguments = {**DIGITS, **(FAMILY["TARFlow"] if name in ABLATIONS else {}), **flow}
        noise = arguments.pop("noise", None)
        teacher = None
        if name == DISTILLED:
            teacher = TARFlowModel(**DIGITS, **FAMILY["TARFlow"]).eval()
            teacher.load_state_dict(results["TARFlow"][1]["state"])
        settings = {"arguments": arguments, "noise": noise, "distilled": name == DISTILLED, "steps": steps}
        results[name] = runs.get(
            "digits_" + file_name(name),
            {**settings, "seed": seed, "batch": BATCH, "lr": LEARNING_RATE},
            partial(digit_run, arguments, noise, samples, reader, steps, seed, teacher),
        )
    return results


def digit_run(
    arguments: dict[str, Any],
    noise: float | None,
    samples: Samples,
    reader: DigitReader,
    steps: int,
    seed: int,
    teacher: TARFlowModel | None,
) -> Result:
    """One flow of digits; see `digit_results`."""
    generator = torch.Generator().manual_seed(seed + 1)
    add_noise = uniform if noise is None else gaussian(noise)
    if noise is not None:
        train, held_out_pictures = (part / (LEVELS - 1) * 2 - 1 for part in (samples.train, samples.held_out))
        samples = Samples(train, held_out_pictures, *samples.labels())
    held_out = add_noise(samples.held_out, generator), samples.labels()[1]
    batches = labelled_batches(samples, arguments["num_classes"], add_noise)
    numbers, model = labelled_run(arguments, batches, held_out, steps, seed, teacher)
    labels = torch.arange(SAMPLES) % model.null_label
    made = draw(model, SAMPLES, labels)
    tensors: dict[str, Any] = {"samples": as_pixels(made, noise), "state": model.state_dict()}
    numbers["accuracy"] = reader.accuracy(tensors["samples"], labels)
    if noise is None:
        numbers["bits"] = (numbers["nats"] + math.log(LEVELS / 2)) / math.log(2)
    else:
        tensors["denoised"] = as_pixels(score_denoise(model, made, noise, class_labels=labels), noise)
        numbers["denoised_accuracy"] = reader.accuracy(tensors["denoised"], labels)
    if noise is None and arguments == {**DIGITS, **FAMILY["TARFlow"]}:
        drawings = {name: as_pixels(draw(model, SAMPLES, labels, **way), noise) for name, way in DRAWINGS.items()}
        numbers["accuracies"] = {name: reader.accuracy(pixels, labels) for name, pixels in drawings.items()}
        tensors["drawings"] = drawings
    return numbers, tensors

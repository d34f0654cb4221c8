"""Everything that the published code computed from a model, computed anew from the same inputs.

A reference folder has the model (``model.pth`` or ``model.safetensors``), its arguments (``config.json`` or
``config.yaml``) and ``expected.safetensors`` with inputs and outputs by name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tarflow.flows.conversion import family_of
from tarflow.flows.denoising import learned_denoise, score_denoise
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.likelihood import bits_per_dim, dequantize, flow_loss, log_prob, nats_per_dim
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.call.walk import default_scheduler, walk_down
from tarflow.pipeline.conversion import load_published

INPUTS = {"x", "cond", "null_cond", "class_labels", "class_labels_dropped", "prior_noise", "image_uint8"}
INPUTS |= {"dequantization_noise", "noise_level"}
SAMPLE_TOLERANCE, TOLERANCE = 1e-4, 1e-5
#: The noise level that iTARFlow's reference samples are drawn at.
SAMPLE_LEVEL = 0.3
NUMBER = r"(\d+(?:\.\d+)?)"


@dataclass(frozen=True)
class Comparison:
    """One tensor: its largest absolute error and what is allowed; infinite if it was not computed."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def find_file(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{str(folder)!r} is no reference folder: it has none of {', '.join(names)}")


def check_folder(folder: str | Path) -> list[Comparison]:
    """Load the model of a reference folder as `convert_checkpoint` does, and compare all it gives.

    Raises:
        ValueError: if the folder lacks a file or the model does not convert.
    """
    folder = Path(folder)
    checkpoint = find_file(folder, "model.pth", "model.safetensors")
    model, arguments = load_published(checkpoint, find_file(folder, "config.json", "config.yaml"))
    expected = load_file(find_file(folder, "expected.safetensors"))
    return compare(recompute(model, arguments, expected), expected)


def recompute(model: TARFlowModel, arguments: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our values by the names of ``expected``, from its inputs.

    Args:
        model: the converted model.
        arguments: of the published model class.
        expected: inputs and outputs.
    """
    values = {"tarflow": tarflow_values, "starflow": starflow_values, "itarflow": itarflow_values}
    return values[family_of(arguments)](model, expected)


def compare(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> list[Comparison]:
    """One comparison for each expected output, in their order."""
    comparisons = []
    for name, value in expected.items():
        if re.sub(r"_\d+x\d+$", "", name) in INPUTS:
            continue
        limit = SAMPLE_TOLERANCE if name.startswith("sample") else TOLERANCE * max(float(value.abs().max()), 1e-6)
        error = math.inf
        if name in ours and ours[name].shape == value.shape:
            error = float((ours[name].detach() - value).abs().max())
        comparisons.append(Comparison(name, error, limit))
    return comparisons


@torch.no_grad()
def tarflow_values(model: TARFlowModel, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """What TARFlow's reference folders hold: tokens, not images, where the published code gives them."""
    x, labels = expected["x"], expected.get("class_labels")
    side = model.config.sample_size // model.config.patch_size
    ours: dict[str, Tensor] = {}
    z, log_det, outputs = model(x, labels, return_block_outputs=True)
    ours["z"], ours["logdet_per_dim"] = model.patchify(z)[0], log_det / z[0].numel()
    ours["loss"] = flow_loss(z, log_det)
    ours |= {f"block_output_{i}": model.patchify(output)[0] for i, output in enumerate(outputs)}
    if "class_labels_dropped" in expected:
        dropped = expected["class_labels_dropped"]
        z, log_det = model(x, torch.where(dropped < 0, model.null_label, dropped))
        ours["z_dropped"], ours["logdet_per_dim_dropped"] = model.patchify(z)[0], log_det / z[0].numel()
        ours["loss_dropped"] = flow_loss(z, log_det)
    if "image_uint8" in expected:
        pixels = dequantize(expected["image_uint8"], expected["dequantization_noise"])
        nats = nats_per_dim(log_prob(model, pixels), pixels[0].numel())
        ours["nll_nats_per_dim_minus1_1"], ours["bits_per_dim_uint8"] = nats, bits_per_dim(nats)
    if "prior_noise" in expected:
        noise = model.scale_noise(model.unpatchify(expected["prior_noise"], (side, side)))
        for key in expected:
            pattern = rf"sample_guidance{NUMBER}(?:_(ab|a|b))?(?:_attn_temp{NUMBER})?(_annealed)?"
            if found := re.fullmatch(pattern, key):
                weight, parts, temperature, annealed = found.groups()
                guidance = Guidance(float(weight), "linear", parts or "ab", bool(annealed), float(temperature or 1))
                ours[key], _ = model.inverse(noise, labels, guidance=guidance)
    for key in expected:
        if found := re.fullmatch(rf"score_denoised_sigma{NUMBER}", key):
            ours[key] = score_denoise(model, x, float(found[1]), labels)
    return ours


@torch.no_grad()
def starflow_values(model: TARFlowModel, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """What STARFlow's reference folders hold, for each of their latent sizes."""
    ours: dict[str, Tensor] = {}
    suffixes = {key.removeprefix("x") for key in expected if re.fullmatch(r"x(_\d+x\d+)?", key)}
    for suffix in sorted(suffixes):

        def value(name: str, suffix: str = suffix) -> Tensor:
            return expected[name + suffix if name + suffix in expected else name]

        x = value("x")
        condition: dict[str, Tensor] = {}
        null: dict[str, Tensor] = {}
        if model.config.conditioning == "class_prefix":
            named = "class_labels" in expected or f"class_labels{suffix}" in expected
            condition = {"class_labels": value("class_labels") if named else value("cond")[:, 0].argmax(-1)}
        elif model.config.conditioning == "prefix":
            condition, null = {"cond": value("cond")}, {"null_cond": value("null_cond")}
        z, log_det = model(x, **condition)
        ours["z" + suffix], ours["logdet_per_dim" + suffix] = z, log_det / z[0].numel()
        ours["loss" + suffix], ours["loss_z" + suffix] = flow_loss(z, log_det), 0.5 * z.pow(2).mean()
        ours["loss_logdet" + suffix] = -log_det.mean() / z[0].numel()
        if model.denoiser is not None:
            ours["denoiser_output" + suffix] = model.scaled_score(x, **condition)
        for key in expected:
            if found := re.fullmatch(rf"sample_guidance{NUMBER}" + suffix, key):
                guidance, noise = Guidance(float(found[1])), value("prior_noise")
                ours[key], _ = model.inverse(noise, **condition, **null, guidance=guidance)
            elif found := re.fullmatch(rf"score_denoised_sigma{NUMBER}" + suffix, key):
                ours[key] = score_denoise(model, x, float(found[1]), **condition)
            elif (found := re.fullmatch(rf"denoised_sigma{NUMBER}" + suffix, key)) and model.denoiser is not None:
                ours[key] = learned_denoise(model, x, float(found[1]), **condition)
    return ours


class FirstRatioGuidance(Guidance):
    """The closed form as the published iTARFlow code computes it for a batch: the shifts of all samples take the ratio of
    variances of the first one. `Guidance` gives each sample its own, so that no sample depends on another; the first
    sample is the same."""

    def __call__(
        self, cond: tuple[Tensor, Tensor], uncond: tuple[Tensor, Tensor], token: int | Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        _, log_scale = super().__call__(cond, uncond, token, num_tokens)
        weighted = (cond[1] - uncond[1])[:1].clamp(max=0.0).mul(2).exp() * self.weight  # w·s of the first sample
        shift = ((1 + self.weight) * cond[0] - weighted * uncond[0]) / (1 + self.weight - weighted)
        return shift, log_scale


@torch.no_grad()
def itarflow_values(model: TARFlowModel, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """What iTARFlow's reference folders hold; its loss is weighted by the level."""
    x, labels, levels = expected["x"], expected.get("class_labels"), expected["noise_level"].flatten()
    side = model.config.sample_size // model.config.patch_size
    ours: dict[str, Tensor] = {}
    z, log_det, outputs = model(x, labels, return_block_outputs=True, noise_level=levels)
    ours["z"], ours["logdet_per_dim"] = model.patchify(z)[0], log_det / z[0].numel()
    ours["loss"], ours["loss_unweighted"] = flow_loss(z, log_det, levels), flow_loss(z, log_det)
    ours |= {f"block_output_{i}": model.patchify(output)[0] for i, output in enumerate(outputs)}
    if "class_labels_dropped" in expected:
        dropped = expected["class_labels_dropped"]
        z, log_det = model(x, torch.where(dropped < 0, model.null_label, dropped), noise_level=levels)
        ours["z_dropped"], ours["logdet_per_dim_dropped"] = model.patchify(z)[0], log_det / z[0].numel()
    for key in expected:
        pattern = rf"sample_guidance{NUMBER}(?:_(linear|gaussian))?(_annealed)?(?:_(deep|all))?"
        if found := re.fullmatch(pattern, key):
            weight, method, annealed, blocks = found.groups()
            noise = model.scale_noise(model.unpatchify(expected["prior_noise"], (side, side)))
            kind = FirstRatioGuidance if method == "gaussian" else Guidance
            name = "gaussian" if method == "gaussian" else "linear_scale"
            guidance = kind(float(weight), name, annealed=bool(annealed), blocks=blocks or "all")
            ours[key], _ = model.inverse(noise, labels, guidance=guidance, noise_level=SAMPLE_LEVEL)
        elif found := re.fullmatch(rf"score_denoised_sigma{NUMBER}", key):
            ours[key] = score_denoise(model, x, float(found[1]), labels)
        elif found := re.fullmatch(rf"iterated_{NUMBER}_{NUMBER}_steps(\d+)(_clipped)?", key):
            scheduler = default_scheduler((float(found[2]), float(found[1])))
            scheduler.set_timesteps(int(found[3]))
            ours[key] = walk_down(scheduler, x, lambda y, level: score_denoise(model, y, level, labels), bool(found[4]))
    return ours

"""What an exact flow can do with pictures: a picture for each tool, as docs/exact_flow.md shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tarflow.common.files import write_picture
from tarflow.common.progress import announce
from tarflow.data.config import DataConfig
from tarflow.data.images import bytes_of, collate
from tarflow.data.stream.first import open_pictures
from tarflow.data.subset import Subset, spread
from tarflow.evaluation.likelihood.out_of_distribution import detect, detection_chart
from tarflow.experiments.decoding import labelled_rows
from tarflow.experiments.settings import ExactFlowConfig
from tarflow.pipeline.conditions import check_class_names
from tarflow.pipeline.opening import open_pipeline
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline

Rows = dict[str, Tensor]  # uint8 pictures (N, 3, H, W) by the row's name


def generator_of(config: ExactFlowConfig) -> torch.Generator:
    """Of all that is random."""
    return torch.Generator().manual_seed(config.seed)


@dataclass
class Batch:
    """Pictures (N, 3, H, W) of 8 bits, and their conditions: "prompt" or "class_labels" by name, or nothing."""

    images: Tensor
    conditions: dict[str, Any]


def read_batch(config: ExactFlowConfig, pipe: TARFlowPipeline) -> Batch:
    images = open_pictures(config.data, config.split, config.num, "num")
    items = spread(images, config.num)
    batch = collate([items[i] for i in range(len(items))])
    kind, conditions = pipe.flow.config.conditioning, {}
    if kind == "prefix" and "caption" in batch:
        conditions = {"prompt": batch["caption"]}
    elif kind.startswith("class") and "label" in batch:
        check_class_names(pipe, images.class_names)
        conditions = {"class_labels": batch["label"].tolist()}
    return Batch(batch["image"], conditions)


def stretched(values: Tensor, size: int) -> Tensor:
    """Numbers (N, 1 or 3, h, w) in [0, 1] as 8-bit pictures (N, 3, size, size)."""
    return bytes_of(F.interpolate(values.clamp(0, 1).expand(-1, 3, -1, -1).float(), size=(size, size)))


def encode(config: ExactFlowConfig, pipe: TARFlowPipeline) -> Rows:
    batch = read_batch(config, pipe)
    out = pipe.encode(batch.images, **batch.conditions, generator=generator_of(config))
    print(
        f"largest |x − x'| of latents → z → latents: {out.error.max():.1e}; standard deviation of z {out.z.std():.3f}"
    )
    again = pipe.vary(batch.images, 0.0, **batch.conditions, generator=generator_of(config), output_type="pt").images
    noise = stretched(out.z[:, :3].cpu() / 6 + 0.5, batch.images.shape[-1])
    return {"picture": batch.images, "3 channels\nof z": noise, "decoded\nagain": bytes_of(again)}


def likelihood(config: ExactFlowConfig, pipe: TARFlowPipeline) -> Rows:
    batch = read_batch(config, pipe)
    out = pipe.log_likelihood(batch.images, **batch.conditions, generator=generator_of(config))
    alone = pipe.log_likelihood(batch.images, generator=generator_of(config))
    level = "" if pipe.drawing_level is None else f" at noise level {pipe.drawing_level:g}"
    for name, values in (("with its condition", out.nats_per_dim), ("with none", alone.nats_per_dim)):
        print(f"nats per dimension {name}{level}:", " ".join(f"{value:.3f}" for value in values.tolist()))
    if out.map is None:
        print("the flow's blocks are not autoregressive: no token has a likelihood of its own")
        return {"picture": batch.images}
    low, high = out.map.flatten(1).aminmax(dim=1)
    low, high = low[:, None, None], high[:, None, None]  # each picture from its cheapest token, black, to white
    expensive = ((high - out.map) / (high - low))[:, None]
    return {"picture": batch.images, "-log p of\neach token": stretched(expensive.cpu(), batch.images.shape[-1])}


def interpolate(config: ExactFlowConfig, pipe: TARFlowPipeline) -> Rows:
    images = read_batch(config, pipe).images[:2]
    if len(images) < 2:
        raise ValueError(f"interpolation is between two pictures, but the split {config.split!r} has {len(images)}")
    (first, second), rows = images, {}
    for path in ("spherical", "linear"):
        out = pipe.interpolate(first, second, 8, path, generator=generator_of(config), output_type="pt")
        rows[path] = bytes_of(out.images)
    return rows


def vary(config: ExactFlowConfig, pipe: TARFlowPipeline) -> Rows:
    batch, rows = read_batch(config, pipe), {}
    for strength in (0.0, 0.2, 0.4, 0.7, 1.0):
        out = pipe.vary(batch.images, strength, **batch.conditions, generator=generator_of(config), output_type="pt")
        rows[f"strength {strength:g}"] = bytes_of(out.images)
    return {"picture": batch.images, **rows}


def inpaint(config: ExactFlowConfig, pipe: TARFlowPipeline) -> Rows:
    batch = read_batch(config, pipe)
    mask = torch.zeros(batch.images.shape[2:], dtype=torch.bool)
    mask[:, mask.shape[1] // 2 :] = True  # the right half
    rows = {"picture": batch.images, "known": torch.where(mask, 128, batch.images)}
    for method in ("fill", "metropolis"):
        options: dict[str, Any] = {"method": method, "steps": config.steps, "step_size": config.step_size}
        options |= {"generator": generator_of(config), "output_type": "pt"}
        out = pipe.inpaint(batch.images, mask, **batch.conditions, **options)
        rows[method] = bytes_of(out.images)
        changed = (rows[method] != batch.images)[:, :, ~mask].sum()
        print(f"{method}: log p {out.log_prob.mean(-1).flatten()[-1]:.1f}, {changed} known pixels changed", end="")
        if out.acceptance is not None:
            print(f", from {out.log_prob[0].mean():.1f}; {out.acceptance.mean():.0%} of the proposals accepted", end="")
        print()
    truth = pipe.log_likelihood(batch.images, **batch.conditions, generator=generator_of(config)).log_prob.mean()
    print(f"the pictures themselves: log p {truth:.1f}")
    return rows


def swap(config: ExactFlowConfig, pipe: TARFlowPipeline) -> Rows:
    batch = read_batch(config, pipe)
    if not batch.conditions:
        raise ValueError("the model or the data has no conditions to swap")
    ((name, source),) = batch.conditions.items()
    target = source[1:] + source[:1]
    names = ("source_prompt", "target_prompt") if name == "prompt" else ("source_labels", "target_labels")
    rows = {"picture": batch.images}
    for scale in (1.0, 2.0):
        out = pipe.swap(
            batch.images,
            **dict(zip(names, (source, target), strict=True)),
            guidance_scale=scale,
            generator=generator_of(config),
            output_type="pt",
        )
        rows[f"as the next,\nguidance {scale:g}"] = bytes_of(out.images)
    print("\n".join(f"{one} → {other}" for one, other in zip(source, target, strict=True)))
    return rows


def temperature(config: ExactFlowConfig, pipe: TARFlowPipeline) -> Rows:
    batch = read_batch(config, pipe)
    rows: Rows = {}
    counts: dict[str, Any] = {**batch.conditions} or {"num_images": config.num}
    for factor in (0.4, 0.7, 0.9, 1.0, 1.2):
        options: dict[str, Any] = {"temperature": factor, "generator": generator_of(config), "output_type": "pt"}
        images, *_ = pipe(**counts, **options, return_dict=False)
        rows[f"T = {factor:g}"] = bytes_of(images)
    return rows


def best_of(config: ExactFlowConfig, pipe: TARFlowPipeline) -> Rows:
    batch = read_batch(config, pipe)
    condition = {name: values[0] for name, values in batch.conditions.items()}
    out = pipe.best_of(config.num, **condition, guidance_scale=1.0, generator=generator_of(config), output_type="pt")
    shown = min(8, config.num)
    print(f"{condition}: log p from {out.log_prob[0]:.1f} to {out.log_prob[-1]:.1f}")
    return {"likeliest": bytes_of(out.images[:shown]), "unlikeliest": bytes_of(out.images[-shown:])}


def name_of(data: DataConfig) -> str:
    """Of pictures in titles: of their folder, or of their source."""
    return data.source if data.path is None else Path(str(data.path)).stem


def out_of_distribution(config: ExactFlowConfig, pipe: TARFlowPipeline) -> None:
    if config.outside is None:
        raise ValueError("the tool 'ood' needs outside, the pictures to tell from those of data")
    images, outside = (open_pictures(data, config.split, config.num, "num") for data in (config.data, config.outside))
    inside = spread(images, config.num)
    train = open_pictures(config.data, "train", config.num, "num")
    own = Subset(train, range(min(config.num, len(train))))
    detections = detect(pipe, inside, spread(outside, config.num), own, seed=config.seed)
    for one in detections:
        counts = f"{len(one.inside)} inside, {len(one.outside)} outside"
        means = f"mean {one.inside.mean():.3f} inside, {one.outside.mean():.3f} outside"
        print(f"{one.name}: AUC {one.auc:.4f} ({counts}; {means})")
    own_name, other_name = name_of(config.data), name_of(config.outside)
    title = f"{config.pipeline}: {own_name} (its own kind) and {other_name}"
    detection_chart(detections, (own_name, other_name), title, Path(config.out))


TOOLS: dict[str, Callable[[ExactFlowConfig, TARFlowPipeline], Rows]] = {
    "encode": encode,
    "likelihood": likelihood,
    "interpolate": interpolate,
    "vary": vary,
    "inpaint": inpaint,
    "swap": swap,
    "temperature": temperature,
    "best_of": best_of,
}


#: Tools that take more than half a minute on a CPU.
LONG = ("inpaint", "ood")


def draw_tool(config: ExactFlowConfig) -> None:
    """Open the pipeline, use the tool, print what it measured and write the picture.

    Raises:
        ValueError: for settings that do not fit the pipeline, and a place that cannot be written to.
    """
    pipe = open_pipeline(config.pipeline)
    if config.tool in LONG:
        fewer = "fewer --steps end sooner" if config.tool == "inpaint" else "--num takes fewer"
        announce(f"{config.tool} of {config.num} pictures: on a CPU that takes minutes, {fewer}")
    if config.tool == "ood":
        out_of_distribution(config, pipe)
    else:
        write_picture(config.out, labelled_rows(TOOLS[config.tool](config, pipe), least=64), optimize=True)
    print(f"the picture is {config.out}")

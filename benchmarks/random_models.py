"""Models with the shapes of configurations, random weights and random inputs: for speed and memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tarflow import configs
from tarflow.flows.model import TARFlowModel

#: What a run finds out from its data and autoencoder, where a configuration does not say it. The number of classes
#: hardly matters for speed and memory; the autoencoders of all configurations make pictures 8 times smaller.
CLASSES, FACTOR = 10, 8


@dataclass(frozen=True)
class Shape:
    """What a configuration says about its flow.

    Attributes:
        arguments: of `TARFlowModel`, complete.
        prefix_length: tokens of the condition's sequence with the conditioning "prefix".
    """

    arguments: dict[str, Any]
    prefix_length: int


def shape_of(name: str) -> Shape:
    """The shape of a configuration: a shipped one by its bare name, or a YAML file.

    Raises:
        ValueError: if there is no such configuration, or it has no flow.
    """
    path = configs.resolve(name)
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "flow" not in config:
        raise ValueError(f"the configuration {path!r} has no flow")
    arguments, text = dict(config["flow"]), config.get("text", {})
    if (kind := arguments.pop("kind", "flow")) != "flow":
        raise ValueError(f"benchmarks are of flows, but {path!r} has flow.kind {kind!r}")
    pixels, size = config["vae"]["name"] in (None, "none"), config["data"]["image_size"]
    arguments.setdefault("sample_size", size if pixels else size // FACTOR)
    if pixels:
        arguments.setdefault("in_channels", 3)
    if arguments.get("conditioning", "none").startswith("class"):
        arguments.setdefault("num_classes", CLASSES)
    if arguments.get("conditioning") == "prefix":
        arguments.setdefault("cond_dim", text.get("width"))
    return Shape(arguments, text.get("max_length", 0))


def random_model(name: str, device: str, dtype: torch.dtype, **changes: Any) -> TARFlowModel:
    """A model of the shape of a configuration with random weights, neither the identity nor wild: shifts and scales are
    about as large at any width, so that rounding grows as little from block to block as in a trained one.

    Args:
        changes: arguments of the model to replace.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = TARFlowModel(**{**shape_of(name).arguments, **changes}).to(dtype)
        for block in model.blocks:
            torch.nn.init.normal_(block.proj_out.weight, std=0.02 * (128 / block.config.transformer.width) ** 0.5)
    return model.eval()


def random_inputs(model: TARFlowModel, batch: int, prefix_length: int, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward: ``x`` (B, C, H, W) and labels (B,) or a prefix (B, L, E), if it takes
    them, float32 on the model's device."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    size = config.sample_size
    inputs = {"x": torch.randn(batch, config.in_channels, size, size, generator=generator)}
    if config.conditioning.startswith("class"):
        inputs["class_labels"] = torch.randint(config.num_classes, (batch,), generator=generator)
    elif config.conditioning == "prefix":
        inputs["cond"] = torch.randn(batch, prefix_length, config.cond_dim, generator=generator)
    return {key: value.to(model.device) for key, value in inputs.items()}

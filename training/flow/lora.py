"""Training a LoRA adapter of a pipeline: what is added to its parts, and what is saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from tarflow.common.files import write_text
from tarflow.flows.adapters.adapters import FlowAdapters
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.training.flow.config import RunConfig
from tarflow.training.flow.lora_config import TEXT_TARGETS, LoraConfig
from tarflow.training.flow.setup import Parts
from tarflow.training.flow.start import Start
from tarflow.vae.codec import weights_hash

#: Of the adapter, in flow and text encoder.
NAME = "default"
#: Stands in `README` for any number; re.escape leaves it as it is.
NUMBER = "NUMBER_OF_ANY_SIZE"
README = """# A LoRA adapter

`pytorch_lora_weights.safetensors` is the adapter of rank {rank} that was trained from the pipeline {name!r} in {steps} steps.
Nothing else of that pipeline was changed, and none of it is here. To draw with it:

```python
from tarflow import TARFlowPipeline

pipe = TARFlowPipeline.from_pretrained({name!r})
pipe.load_lora_weights({folder!r})
```

or `tarflow generate … --pipeline {name} --lora {folder}`.
"""


def add_adapters(config: LoraConfig, flow: TARFlowModel, text_encoder: nn.Module | None, seed: int) -> None:
    """Freeze flow and text encoder, and add new adapters to them, which change nothing yet.

    Args:
        config: the settings, with a rank.
        flow: a `TARFlowModel`.
        text_encoder: the small one, or None.
        seed: of the new weights.

    Raises:
        ValueError: for a name of no linear layer.
    """
    linears = {name.split(".")[-1] for name, part in flow.named_modules() if isinstance(part, nn.Linear)}
    if unknown := [name for name in config.target_modules if name not in linears]:
        raise ValueError(
            f"lora.target_modules names {unknown[0]!r}, but the flow's linear layers are {', '.join(sorted(linears))}"
        )
    flow.requires_grad_(False)
    if text_encoder is not None:
        text_encoder.requires_grad_(False)
    alpha = config.rank if config.alpha is None else config.alpha
    settings = {"r": config.rank, "lora_alpha": alpha, "lora_dropout": config.dropout}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        FlowAdapters.add_adapter(flow, peft.LoraConfig(**settings, target_modules=list(config.target_modules)), NAME)
        if config.text_encoder:
            own = peft.LoraConfig(**settings, target_modules=list(TEXT_TARGETS))
            peft.inject_adapter_in_model(own, text_encoder, adapter_name=NAME)


def prepare_adapters(config: RunConfig, parts: Parts, start: Start | None) -> dict[str, Any] | None:
    """Make a run that trains an adapter of one that trains weights: add it to the run's parts.

    Returns:
        what must be the same when training goes on, see `adapter_invariants`; None for a run that trains weights.
    """
    if not config.lora.rank or start is None:  # an adapter is of a pipeline
        return None
    check_base(config, start.pipeline, parts.flow_arguments, parts.train.class_names)
    invariants = adapter_invariants(config, parts.flow)
    add_adapters(config.lora, parts.flow, parts.text_encoder, config.train.seed)
    return invariants


def check_base(config: RunConfig, pipe: TARFlowPipeline, flow_arguments: dict[str, Any], names: Any) -> None:
    """Whether a pipeline with the run's adapter will draw what was trained: all else must be as in training.

    Args:
        config: of the run.
        pipe: that the adapter is of.
        flow_arguments: of the run's flow.
        names: of the data's classes, or None.

    Raises:
        ValueError: that names the first difference, and what to set.
    """
    own, whose = pipe.config, f"the pipeline {config.init_from!r} has"
    side = pipe.flow.config.sample_size
    if side != flow_arguments["sample_size"]:
        pixels = side * pipe.codec.factor
        raise ValueError(f"an adapter is for pictures of the pipeline's size: set data.image_size to {pixels}")
    given = config.train.noise_levels
    levels = None if given is None else (given.low, given.high)
    if levels != pipe.noise_levels:
        told = "none" if pipe.noise_levels is None else "{:g} to {:g}".format(*pipe.noise_levels)
        raise ValueError(
            f"train.noise_levels are {'none' if levels is None else '{:g} to {:g}'.format(*levels)}, but {whose} {told}, "
            "which an adapter cannot change: set train.noise_levels to the same"
        )
    if levels is None and (config.train.noise != "gaussian" or config.train.noise_std != own.noise_std):
        raise ValueError(
            f"train.noise_std is {config.train.noise_std}, but {whose} {own.noise_std}, which an adapter cannot change: "
            f"set train.noise_std to {own.noise_std}"
        )
    if config.text.kind != "none" and config.text.max_length != own.max_sequence_length:
        raise ValueError(
            f"text.max_length is {config.text.max_length}, but {whose} {own.max_sequence_length}: set it to that"
        )
    known = [name for _, name in sorted((own.id2label or {}).items(), key=lambda pair: int(pair[0]))]
    if flow_arguments.get("num_classes") and known and list(names or ()) != known:
        raise ValueError(f"the data's classes are {', '.join(names or ())}, but {whose} {', '.join(known)}")


def adapter_invariants(config: RunConfig, flow: nn.Module) -> dict[str, Any]:
    """What must be the same when the training of an adapter goes on, by readable names.

    Args:
        flow: before it gets the adapter.
    """
    lora = config.lora
    return {
        "lora.rank": lora.rank,
        "lora.alpha": lora.alpha,
        "lora.target_modules": list(lora.target_modules),
        "lora.text_encoder": lora.text_encoder,
        "the flow of init_from": weights_hash(flow),
    }


def save_adapters(pipe: TARFlowPipeline, config: RunConfig, folder: Path, step: int) -> None:
    """Write a pipeline's adapters, and how to draw with them, to a folder.

    A README.md that is there is left alone, unless it still is as an earlier save wrote it: its numbers are brought up to
    date.
    """
    encoder = pipe.text_encoder if config.lora.text_encoder else None
    pipe.save_lora_weights(folder, pipe.flow, encoder, adapter_name=NAME)
    names = {"name": str(config.init_from), "folder": str(folder)}
    file = folder / "README.md"
    if not file.exists() or is_unchanged(file.read_bytes(), names):
        write_text(file, README.format(**names, rank=config.lora.rank, steps=step))


def is_unchanged(content: bytes, names: dict[str, str]) -> bool:
    """Whether a file is `README` of some rank and number of steps, and nobody has written in it."""
    as_saved = re.escape(README.format(**names, rank=NUMBER, steps=NUMBER)).replace(NUMBER, "[0-9]+")
    return re.fullmatch(as_saved.encode(), content) is not None


def folder_name(name: str) -> str:
    """Where the adapter of what would be a pipeline folder goes: "lora" instead of "pipeline", "lora_ema_0.9", …"""
    return name.replace("pipeline", "lora", 1)

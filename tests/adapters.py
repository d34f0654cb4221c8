"""LoRA adapters of small pipelines."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from pipelines import make_pipeline

from tarflow import TARFlowModel, TARFlowPipeline

FILE = "pytorch_lora_weights.safetensors"


def add(model: Any, name: str = "default", std: float = 0.1, **options: Any) -> None:
    """A LoRA adapter that changes something: its B is not zero."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 8, **options})
    if isinstance(model, TARFlowModel):
        model.add_adapter(config, adapter_name=name)
    else:
        inject_adapter_in_model(config, model, adapter_name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}." in key:
                parameter.normal_(std=std)


def pipeline(conditioning: str = "class_prefix", **options: Any) -> TARFlowPipeline:
    torch.manual_seed(0)
    return make_pipeline(conditioning, **options)


def arguments(pipe: TARFlowPipeline) -> dict[str, Any]:
    if pipe.flow.config.conditioning == "prefix":
        return {"prompt": ["a red ring", "a blue star"], "output_type": "latent", "decoding": "sequential"}
    return {"class_labels": ["tench", "church"], "output_type": "latent", "decoding": "sequential"}

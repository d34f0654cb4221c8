"""Files of PEFT adapters, as Diffusers writes and reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from torch import Tensor, nn

from tarflow.common.files import replaced


def header(metadata: dict[str, Any]) -> dict[str, str]:
    """Settings of adapters as a safetensors file has them."""
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in metadata.items()}
    return {"format": "pt"} | (
        {LORA_ADAPTER_METADATA_KEY: json.dumps(values, indent=2, sort_keys=True)} if values else {}
    )


def adapter_of(model: nn.Module, adapter_name: str | None, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of one adapter of a model.

    Args:
        adapter_name: None for the only one.
        part: what the model is called in the error.

    Raises:
        ValueError: if there is no such adapter, or several and none is named.
    """
    from peft.utils import get_peft_model_state_dict

    configs: dict[str, Any] = getattr(model, "peft_config", {})
    names = sorted(configs)
    if adapter_name is None and len(names) == 1:
        adapter_name = names[0]
    if adapter_name is None or adapter_name not in configs:
        found = ", ".join(names) or "none"
        raise ValueError(f"name the adapter of the {part} that is to be saved, adapter_name=…; it has: {found}")
    return get_peft_model_state_dict(model, adapter_name=adapter_name), configs[adapter_name].to_dict()


def write_adapters(
    folder: str | Path,
    state: dict[str, Tensor],
    metadata: dict[str, Any],
    weight_name: str | None = None,
    safe_serialization: bool = True,
    save_function: Callable[..., Any] | None = None,
) -> None:
    """Write adapters to a file of a folder, ``pytorch_lora_weights.safetensors`` if no other is named.

    Args:
        folder: made if it is not there.
        state: weights by name.
        metadata: settings by name.
        weight_name, safe_serialization, save_function: as of Diffusers.

    Raises:
        ValueError: if the folder is a file.
        OSError: that names the file, if it cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file; give a folder")
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    path = folder / (weight_name or (LORA_WEIGHT_NAME_SAFE if safe_serialization else LORA_WEIGHT_NAME))
    with replaced(path) as temporary:
        if save_function is not None:
            save_function(state, str(temporary))
        elif safe_serialization:
            safetensors.torch.save_file(state, str(temporary), metadata=header(metadata))
        else:
            torch.save(state, temporary)

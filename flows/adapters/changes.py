"""Adding PEFT adapters to a model of any class so that it is as before after an error, and its offloading knows them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.utils.peft_utils import delete_adapter_layers
from torch import Tensor, nn

from tarflow.flows.layers.prepared import is_on_files


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Layers of a model that have adapters, by name."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # nobody who has not imported it has its layers
    if peft is None:
        return {}
    return {name: part for name, part in model.named_modules() if isinstance(part, peft.BaseTunerLayer)}


def names_and_weights(names: str | list[str], weights: Any) -> tuple[list[str], list[Any]]:
    """Adapters that are to be active, and a weight for each, as ``set_adapters`` gets them.

    Raises:
        ValueError: for another number of weights.
    """
    names = [names] if isinstance(names, str) else list(names)
    weights = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"set_adapters got {len(names)} adapters and {len(weights)} weights: give one for each")
    return names, weights


def names_of(layer: Any) -> set[str]:
    """Adapters of a layer, active or not."""
    return {adapter for name in layer.adapter_layer_names for adapter in getattr(layer, name)}


def follow_mode(model: nn.Module) -> None:
    """Bring adapters into their layers' mode. New ones are in training mode whatever the model's, so that their dropout
    would act when it draws."""
    for layer in adapter_layers(model).values():
        layer.train(layer.get_base_layer().training)


def refuse_offloading_to_files(model: nn.Module) -> None:
    """Refuse to change adapters of a model whose weights are offloaded to files: Diffusers would use the tensors in
    memory instead, and would not write the files again."""
    if is_on_files(model):
        raise ValueError(
            f"the weights of this {type(model).__name__} are offloaded to files, which cannot get or lose adapters: change "
            "them first, then offload to a new folder (offload_to_disk_path)"
        )


@contextmanager
def changing_adapters(model: nn.Module, swapped: str | None = None) -> Iterator[None]:
    """A block that adds adapters to a model, which is as before after an error. Group offloading is applied anew when it
    ends, as new layers have no hooks.

    Args:
        model: of any class.
        swapped: an adapter whose weights the block may change.

    Raises:
        ValueError: for weights that are offloaded to files; and what the block raises.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    refuse_offloading_to_files(model)
    configs = dict(getattr(model, "peft_config", None) or {})
    layers = {
        name: (list(layer.active_adapters), dict(getattr(layer, "scaling", {})))
        for name, layer in adapter_layers(model).items()
    }
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = weights_of(model, swapped) if swapped is not None and swapped in configs else None
    try:
        yield
        if swapped is not None and weights is not None:
            check_swapped(weights, weights_of(model, swapped))
    except BaseException:
        added = {name for layer in adapter_layers(model).values() for name in names_of(layer)} - set(configs)
        for name in added:
            delete_adapter_layers(model, name)
        if swapped is not None and weights is not None:
            put_back(model, swapped, configs[swapped], weights)
        remove_empty_layers(model)
        for name, layer in adapter_layers(model).items():
            active, scaling = layers[name]
            layer.set_adapter(active)
            if scaling:
                layer.scaling.update(scaling)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        if configs:
            model.peft_config = configs
        elif hasattr(model, "peft_config"):
            del model.peft_config
        model._hf_peft_config_loaded = bool(configs)
        follow_mode(model)
        raise
    finally:
        _maybe_remove_and_reapply_group_offloading(model)


def weights_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """A copy of an adapter's weights."""
    from peft.utils import get_peft_model_state_dict

    return {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}


def check_swapped(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Refuse LoRA weights, swapped in place, that are for other layers than those before; PEFT accepts them silently.
    Ranks may differ: rows of A (r, in), columns of B (out, r)."""
    for name, value in new.items():
        axis = 1 if "lora_A" in name else 0
        if name in old and value.dim() == 2 and value.shape[axis] != old[name].shape[axis]:
            raise ValueError(
                f"these adapters do not fit: {name} has shape {tuple(value.shape)}, but the layer's size is "
                f"{old[name].shape[axis]} along axis {axis}"
            )


def put_back(model: nn.Module, name: str, config: Any, weights: dict[str, Tensor]) -> None:
    """Give a model an adapter of these weights, in whose layers it still may be."""
    from peft import inject_adapter_in_model

    if not any(name in names_of(layer) for layer in adapter_layers(model).values()):
        inject_adapter_in_model(config, model, adapter_name=name, state_dict=weights)
    for key, parameter in model.named_parameters():
        head, _, tail = key.rpartition(f".{name}.")
        if f"{head}.{tail}" in weights:
            parameter.data = weights[f"{head}.{tail}"]


def remove_empty_layers(model: nn.Module) -> None:
    """Make layers that have no adapters left plain ones again."""
    for name, layer in adapter_layers(model).items():
        if not names_of(layer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())

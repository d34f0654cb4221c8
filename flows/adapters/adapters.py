"""PEFT adapters (LoRA and the like) on a flow, as in Diffusers.

A flow's linear layers are, in each Transformer layer, ``qkv`` (queries, keys and values in one), ``proj``, ``up`` and
``down``; and in each block ``proj_in``, ``proj_out`` and, with a prefix as the condition, ``proj_cond``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from tarflow.common.tensors import is_quantized
from tarflow.flows.adapters.changes import (
    adapter_layers,
    changing_adapters,
    follow_mode,
    names_and_weights,
    names_of,
    refuse_offloading_to_files,
)
from tarflow.flows.adapters.files import adapter_of, write_adapters
from tarflow.flows.adapters.targets import LORA_TARGETS


def adapters_state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Which adapters act on a model's layers, and which are in their weights: what differs when others do."""
    return [
        (name, tuple(layer.merged_adapters), layer.disable_adapters, tuple(layer.active_adapters))
        for name, layer in adapter_layers(model).items()
    ]


def acting_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that change what a model computes, merged ones included."""
    names: set[str] = set()
    for layer in adapter_layers(model).values():
        names |= set(layer.merged_adapters)
        names |= set() if layer.disable_adapters else set(layer.active_adapters)
    return sorted(names)


def without_adapters(model: nn.Module, named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Of a model's named values those that are not of adapters, by the names that they have without adapters."""
    prefixes = tuple(f"{name}." for name in adapter_layers(model))
    own = tuple(f"{prefix}base_layer." for prefix in prefixes)
    for name, value in named:
        if not name.startswith(prefixes) or name.startswith(own):
            yield name.replace(".base_layer.", "."), value


class FlowAdapters(PeftAdapterMixin):
    """Diffusers' ``add_adapter``, ``load_lora_adapter``, ``save_lora_adapter``, ``set_adapters``, ``disable_adapters``,
    ``enable_adapters``, ``fuse_lora``, ``unfuse_lora``, ``delete_adapters`` and ``unload_lora`` for a flow."""

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add an adapter, which is active then.

        Args:
            adapter_config: of PEFT, for example a ``LoraConfig``; without ``target_modules`` they are `LORA_TARGETS`.
            adapter_name: another than those that there are.

        Raises:
            ValueError: if the name is taken, or no layer is of that name.
        """
        if getattr(adapter_config, "target_modules", ...) is None:
            adapter_config.target_modules = set(LORA_TARGETS)
        with changing_adapters(self):
            super().add_adapter(adapter_config, adapter_name)
            follow_mode(self)

    def set_adapters(self, adapter_names: str | list[str], weights: Any = None) -> None:
        """Make these adapters the active ones.

        Args:
            adapter_names: one or several.
            weights: how strongly each acts, a number or one for each; 1 if not given. Instead of a number a dictionary
                by parts of the flow, for example {"blocks.0": 0.5, "blocks.3.layers.1": 0}; the rest has 1.

        Raises:
            ValueError: for an adapter or a part that there is not, or another count of weights.
        """
        names, weights = names_and_weights(adapter_names, weights)
        layers, known = adapter_layers(self), sorted(getattr(self, "peft_config", {}))
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"the flow has no adapter {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
        weights = [1.0 if weight is None else weight for weight in weights]
        for part in {part for weight in weights if isinstance(weight, dict) for part in weight}:
            if not any(is_within(name, part) for name in layers):
                raise ValueError(
                    f"no layer with an adapter is in {part!r}; name a part of the flow, such as 'blocks.0'"
                )
        for name, layer in layers.items():
            layer.set_adapter(names)
            for adapter, weight in zip(names, weights, strict=True):
                layer.set_scale(adapter, weight_of(weight, name))

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As of Diffusers; after an error the flow is as before."""
        with changing_adapters(self, kwargs.get("adapter_name") if kwargs.get("hotswap") else None):
            super().load_lora_adapter(*args, **kwargs)
            follow_mode(self)

    def save_lora_adapter(
        self,
        save_directory: str | Path,
        adapter_name: str | None = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """As of Diffusers; the file is written whole or not at all, and may be read by whoever may read other new files.

        Args:
            save_directory: the folder.
            adapter_name: None for the only one.
            upcast_before_saving: whether the file has the weights in float32; the flow keeps its own.
            safe_serialization, weight_name: as of Diffusers.

        Raises:
            ValueError: if there is no such adapter, or the folder is a file.
        """
        state, metadata = adapter_of(self, adapter_name, "flow")
        if upcast_before_saving:
            state = {name: value.float() for name, value in state.items()}
        write_adapters(save_directory, state, metadata, weight_name, safe_serialization)

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """As of Diffusers; without any left the layers are plain ones again.

        Raises:
            ValueError: for weights that are offloaded to files.
        """
        if adapter_layers(self):
            refuse_offloading_to_files(self)
        super().delete_adapters(adapter_names)
        if not any(names_of(layer) for layer in adapter_layers(self).values()):
            self.unload_lora()

    def unload_lora(self) -> None:
        """As of Diffusers.

        Raises:
            ValueError: for weights that are offloaded to files.
        """
        if adapter_layers(self):
            refuse_offloading_to_files(self)
        super().unload_lora()

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look at the signature for what they may pass
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As of Diffusers, for a flow without adapters.

        Raises:
            ValueError: if it has some, as a folder of it could not be loaded again; or if its weights were quantized by
                hand, of which nothing would be known when it is loaded.
        """
        refuse_adapters("flow", self)
        if getattr(self, "hf_quantizer", None) is None and any(is_quantized(weight) for weight in self.parameters()):
            raise ValueError(
                "the flow's weights were quantized after it was loaded, which a folder cannot say: load it with "
                "quantization_config=TorchAoConfig(…), which is saved along, or save the flow before"
            )
        return super().save_pretrained(save_directory, *args, **kwargs)


def refuse_adapters(name: str, model: nn.Module) -> None:
    """An error if a model that is to be saved whole has adapters."""
    if layers := adapter_layers(model):
        names = sorted({adapter for layer in layers.values() for adapter in names_of(layer)})
        raise ValueError(
            f"the {name} has adapters ({', '.join(names)}), which are saved by themselves: save_lora_weights; to save the "
            "model, take them out first (unload_lora_weights), or make them a part of it (fuse_lora, then "
            "unload_lora_weights)"
        )


def is_within(name: str, part: str) -> bool:
    """Whether a module is a part, or in it."""
    return name == part or name.startswith(f"{part}.")


def weight_of(weight: float | dict[str, float], name: str) -> float:
    """A layer's weight: that of the smallest part that it is in, else 1."""
    if not isinstance(weight, dict):
        return weight
    parts = [part for part in weight if is_within(name, part)]
    return weight[max(parts, key=len)] if parts else 1.0

"""LoRA adapters of a pipeline's flow and text encoder, from and to files, as in Diffusers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers.loaders.lora_base import (
    LORA_ADAPTER_METADATA_KEY,
    LORA_WEIGHT_NAME,
    LORA_WEIGHT_NAME_SAFE,
    LoraBaseMixin,
    _fetch_state_dict,
)
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from torch import Tensor, nn

from tarflow.common.files import replaced
from tarflow.flows.adapters import adapter_layers, follow_mode, refuse_adapters

#: Parts of a pipeline that may have adapters; names in a file begin with theirs.
PARTS = ("flow", "text_encoder")
#: What names of a flow's own file, saved by ``flow.save_lora_adapter``, begin with.
FLOW_PREFIXES = ("blocks.", "denoiser.")
#: Keyword arguments of ``load_lora_weights`` that say where a file comes from.
SOURCES = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "weight_name",
    "use_safetensors",
)


class LoraLoading(LoraBaseMixin):
    """``load_lora_weights`` and ``save_lora_weights`` of a pipeline; ``set_adapters``, ``fuse_lora``, ``unfuse_lora``,
    ``delete_adapters``, ``disable_lora``, ``enable_lora``, ``unload_lora_weights``, ``get_active_adapters`` and
    ``get_list_adapters`` are Diffusers' own."""

    _lora_loadable_modules = list(PARTS)  # noqa: RUF012 (the library's interface)

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """Read adapters: their weights by name, and with ``return_lora_metadata`` also their settings, or None.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, a hub id, or weights by name.
            kwargs: ``weight_name``, ``subfolder`` and so on as of Diffusers.

        Raises:
            ValueError: if they are not of LoRA adapters of a flow or text encoder.
        """
        source, with_metadata = pretrained_model_name_or_path_or_dict, kwargs.pop("return_lora_metadata", False)
        options = {name: kwargs.pop(name, None) for name in SOURCES}
        if kwargs:
            raise ValueError(f"load_lora_weights knows no argument {min(kwargs)!r}")
        if options["use_safetensors"] is None:
            options["use_safetensors"] = True
        if isinstance(source, str | Path):
            source = str(Path(source).expanduser()) if Path(source).expanduser().exists() else str(source)
        try:
            state, metadata = _fetch_state_dict(source, user_agent={}, allow_pickle=False, **options)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"cannot read adapters from {source!r}: {' '.join(str(error).split())}") from error
        state, metadata = with_prefixes(state, metadata)
        return (state, metadata) if with_metadata else state

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load adapters of flow and text encoder, which are active then.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, a hub id, or weights by name.
            adapter_name: another than those that there are; "default_0", "default_1" and so on if not given.
            hotswap: put the flow's weights in the place of those of a loaded adapter of that name.
            kwargs: ``weight_name``, ``subfolder`` and so on as of Diffusers.

        Raises:
            ValueError: if they do not fit the pipeline; it is as before then.
        """
        low_memory = kwargs.pop("low_cpu_mem_usage", False)
        kwargs["return_lora_metadata"] = True
        state, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        texts = any(name.startswith("text_encoder.") for name in state)
        if texts and self.text_encoder is None:
            raise ValueError("these adapters are of a text encoder too, which this pipeline does not have")
        if texts and hotswap:
            raise ValueError("adapters of a text encoder cannot be swapped in place: leave hotswap out")
        if adapter_name is None:
            used = {name for names in self.get_list_adapters().values() for name in names}
            adapter_name = next(f"default_{i}" for i in range(len(used) + 1) if f"default_{i}" not in used)
        if any(name.startswith("flow.") for name in state):
            self.flow.load_lora_adapter(
                state,
                prefix="flow",
                adapter_name=adapter_name,
                metadata=metadata,
                low_cpu_mem_usage=low_memory,
                hotswap=hotswap,
                _pipeline=self,
            )
        if texts:
            try:
                load_into_text_encoder(
                    self, part_of(state, "text_encoder"), part_of(metadata, "text_encoder"), adapter_name
                )
            except Exception:
                self.delete_adapters(adapter_name)
                raise

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        flow_lora_layers: nn.Module | dict[str, Tensor] | None = None,
        text_encoder_lora_layers: nn.Module | dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        flow_lora_adapter_metadata: dict | None = None,
        text_encoder_lora_adapter_metadata: dict | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Write adapters to a file of a folder, ``pytorch_lora_weights.safetensors``, with their settings.

        Args:
            save_directory: the folder.
            flow_lora_layers, text_encoder_lora_layers: the model itself (``pipe.flow``), or weights by name, as PEFT's
                ``get_peft_model_state_dict`` gives them.
            is_main_process: nothing is written if not.
            weight_name, save_function, safe_serialization: as of Diffusers.
            flow_lora_adapter_metadata, text_encoder_lora_adapter_metadata: settings of weights by name; without them
                loading takes an alpha of the rank, which is a scale of 1.
            adapter_name: which of a model's adapters, if it has several.

        Raises:
            ValueError: if there is nothing to save, or the folder is a file.
        """
        given = {"flow": flow_lora_layers, "text_encoder": text_encoder_lora_layers}
        settings = {"flow": flow_lora_adapter_metadata, "text_encoder": text_encoder_lora_adapter_metadata}
        state: dict[str, Tensor] = {}
        metadata: dict[str, Any] = {}
        for part, layers in given.items():
            if layers is None:
                continue
            weights, found = adapter_of(layers, adapter_name, part) if isinstance(layers, nn.Module) else (layers, None)
            state |= {f"{part}.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
            metadata |= {f"{part}.{name}": value for name, value in (settings[part] or found or {}).items()}
        if not state:
            raise ValueError(
                "there are no adapters to save: give flow_lora_layers=pipe.flow, text_encoder_lora_layers=…"
            )
        folder = Path(save_directory).expanduser()
        if folder.is_file():
            raise ValueError(f"{str(folder)!r} is a file; give a folder")
        if not is_main_process:
            return
        path = folder / (weight_name or (LORA_WEIGHT_NAME_SAFE if safe_serialization else LORA_WEIGHT_NAME))
        with replaced(path) as temporary:
            if save_function is not None:
                save_function(state, str(temporary))
            elif safe_serialization:
                safetensors.torch.save_file(state, str(temporary), metadata=header(metadata))
            else:
                torch.save(state, temporary)

    def fuse_lora(self, components: list[str] | None = None, **options: Any) -> None:
        """Make adapters a part of the weights; see Diffusers. Components are those that have adapters if not given."""
        super().fuse_lora(components or list(self.get_list_adapters()) or ["flow"], **options)

    def unfuse_lora(self, components: list[str] | None = None, **options: Any) -> None:
        """Take adapters out of the weights again; see Diffusers."""
        super().unfuse_lora(components or list(self.get_list_adapters()) or ["flow"], **options)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Take adapters out; without any left the layers are plain ones again."""
        super().delete_adapters(adapter_names)
        encoder = self.text_encoder
        if isinstance(encoder, nn.Module) and not getattr(encoder, "peft_config", None):
            recurse_remove_peft_layers(encoder)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As of `PipelineFiles`, for a pipeline without adapters.

        Raises:
            ValueError: if it has some.
        """
        for part in PARTS:
            if isinstance(getattr(self, part), nn.Module):
                refuse_adapters(part.replace("_", " "), getattr(self, part))
        super().save_pretrained(save_directory, *args, **kwargs)


def header(metadata: dict[str, Any]) -> dict[str, str]:
    """Settings of adapters as a safetensors file has them."""
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in metadata.items()}
    return {"format": "pt"} | (
        {LORA_ADAPTER_METADATA_KEY: json.dumps(values, indent=2, sort_keys=True)} if values else {}
    )


def with_prefixes(state: dict[str, Tensor], metadata: dict[str, Any] | None) -> tuple[dict, dict | None]:
    """Names of a file that all begin with a part's; those of a flow's own file get them.

    Raises:
        ValueError: if a name is of no part, or of no LoRA adapter.
    """
    if state and all(name.startswith(FLOW_PREFIXES) for name in state):
        state = {f"flow.{name}": value for name, value in state.items()}
        metadata = None if metadata is None else {f"flow.{name}": value for name, value in metadata.items()}
    if not state:
        raise ValueError("there are no adapters: the file is empty")
    for name in state:
        if not name.startswith(tuple(f"{part}." for part in PARTS)) or "lora" not in name:
            raise ValueError(
                f"{name!r} is no weight of a LoRA adapter of a flow or text encoder: names begin with 'flow.' or "
                "'text_encoder.' and have 'lora' in them"
            )
    return state, metadata


def part_of(values: dict[str, Any] | None, part: str) -> dict[str, Any] | None:
    """Entries of a part, by their names within it; None for None, and for no entries."""
    found = {
        name.removeprefix(f"{part}."): value for name, value in (values or {}).items() if name.startswith(f"{part}.")
    }
    return found or None


def adapter_of(model: nn.Module, adapter_name: str | None, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of one adapter of a model."""
    from peft.utils import get_peft_model_state_dict

    names = sorted(getattr(model, "peft_config", {}))
    if adapter_name is None and len(names) == 1:
        adapter_name = names[0]
    if adapter_name not in names:
        found = ", ".join(names) or "none"
        raise ValueError(f"name the adapter of the {part} that is to be saved, adapter_name=…; it has: {found}")
    return get_peft_model_state_dict(model, adapter_name=adapter_name), model.peft_config[adapter_name].to_dict()


def load_into_text_encoder(
    pipe: Any, state: dict[str, Tensor], metadata: dict[str, Any] | None, adapter_name: str
) -> None:
    """Add an adapter to a pipeline's text encoder, of any class of Transformers.

    Through PEFT itself: Transformers' own ``load_adapter`` wants a version of it that its other users need not have.

    Raises:
        ValueError: if the adapter has weights of layers that this encoder lacks.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if metadata is None:
        ranks = {name.split(".lora_B")[0]: value.shape[1] for name, value in state.items() if ".lora_B" in name}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        others = {name: value for name, value in ranks.items() if value != rank}
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(ranks), rank_pattern=others, alpha_pattern=dict(others)
        )
    else:
        config = LoraConfig(**metadata)
    held = pipe._optionally_disable_offloading(pipe)
    encoder = pipe.text_encoder
    inject_adapter_in_model(config, encoder, adapter_name=adapter_name, state_dict=state)
    encoder._hf_peft_config_loaded = True
    left = set_peft_model_state_dict(encoder, state, adapter_name).unexpected_keys
    for layer in adapter_layers(encoder).values():
        layer.set_adapter(adapter_name, inference_mode=True)
    follow_mode(encoder)
    if left:
        raise ValueError(f"the pipeline's text encoder has no layer for {left[0]!r}: the adapter is of another one")
    if held[0]:
        pipe.enable_model_cpu_offload()
    elif held[1]:
        pipe.enable_sequential_cpu_offload()

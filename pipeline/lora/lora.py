"""LoRA adapters of a pipeline's flow and text encoder, from and to files, as in Diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict, set_adapters_for_text_encoder
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from torch import Tensor, nn

from tarflow.flows.adapters.adapters import refuse_adapters
from tarflow.flows.adapters.changes import (
    adapter_layers,
    changing_adapters,
    names_and_weights,
    refuse_offloading_to_files,
)
from tarflow.flows.adapters.files import adapter_of, write_adapters
from tarflow.flows.trajectory.kinds import check_flow_kind
from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.pipeline.lora.loading import load_into_text_encoder, refused_in_a_sentence, without_offloading

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


def check_all_loaded(model: nn.Module, weights: Mapping[str, Tensor], adapter_name: str) -> None:
    """Whether a model has taken all of an adapter's weights; what it has no place for is otherwise left out unseen.

    Raises:
        ValueError: that names one which it has not.
    """
    from peft import get_peft_model_state_dict  # imported here: few pipelines have adapters

    taken = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if left := sorted(name for name in weights if "lora_" in name and name not in taken):
        raise ValueError(
            f"the adapter is of another flow: this one has no place for {len(left)} of its {len(weights)} weights, first {left[0]!r}"
        )


class LoraLoading(LoraBaseMixin):
    """``load_lora_weights`` and ``save_lora_weights`` of a pipeline; ``get_active_adapters`` and
    ``get_list_adapters`` are Diffusers' own, and so is what the other methods come down to."""

    _lora_loadable_modules = list(PARTS)  # noqa: RUF012 (the library's interface)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor], **kwargs: Any
    ) -> Any:
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
        if not isinstance(source, str | Path | dict):
            raise ValueError(f"adapters are read from a folder, a file, a hub id, or weights by name, got {source!r}")
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
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
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
        check_flow_kind(self.flow, "adapters are")
        low_memory = kwargs.pop("low_cpu_mem_usage", False)
        kwargs["return_lora_metadata"] = True
        state, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        parts = [part for part in PARTS if any(name.startswith(f"{part}.") for name in state)]
        texts = "text_encoder" in parts
        if texts and self.text_encoder is None:
            raise ValueError("these adapters are of a text encoder too, which this pipeline does not have")
        if texts and hotswap:
            raise ValueError("adapters of a text encoder cannot be swapped in place: leave hotswap out")
        if adapter_name is None:
            used = {name for names in self.get_list_adapters().values() for name in names}
            adapter_name = next(f"default_{i}" for i in range(len(used) + 1) if f"default_{i}" not in used)
        if not hotswap and any(adapter_name in self.get_list_adapters().get(part, ()) for part in parts):
            raise ValueError(
                f"there is an adapter {adapter_name!r} already: give another adapter_name, or take it out first, "
                f"delete_adapters({adapter_name!r})"
            )
        with ExitStack() as around:
            around.enter_context(without_offloading(self))
            around.enter_context(refused_in_a_sentence())
            for part in parts:
                around.enter_context(changing_adapters(getattr(self, part), adapter_name if hotswap else None))
            if "flow" in parts:
                self.flow.load_lora_adapter(
                    state,
                    prefix="flow",
                    adapter_name=adapter_name,
                    metadata=metadata,
                    low_cpu_mem_usage=low_memory,
                    hotswap=hotswap,
                )
                check_all_loaded(self.flow, part_of(state, "flow") or {}, adapter_name)
            if texts:
                own = part_of(state, "text_encoder") or {}
                load_into_text_encoder(self.text_encoder, own, part_of(metadata, "text_encoder"), adapter_name)

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
        flow_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
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
            state |= {f"{part}.{name}": value for name, value in weights.items()}
            metadata |= {f"{part}.{name}": value for name, value in (settings[part] or found or {}).items()}
        if not state:
            raise ValueError(
                "there are no adapters to save: give flow_lora_layers=pipe.flow, text_encoder_lora_layers=…"
            )
        if is_main_process:
            write_adapters(save_directory, state, metadata, weight_name, safe_serialization, save_function)

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        adapter_weights: float | dict[str, Any] | list[float] | list[dict[str, Any]] | None = None,
    ) -> None:
        """Make these adapters the active ones, each in the parts that have it.

        Args:
            adapter_names: one or several.
            adapter_weights: how strongly each acts, a number or one for each; 1 if not given. Instead of a number a dictionary
                by the pipeline's parts, with what `FlowAdapters.set_adapters` takes for "flow".

        Raises:
            ValueError: for an adapter that there is not, or another count of weights.
        """
        check_flow_kind(self.flow, "adapters are")
        names, weights = names_and_weights(adapter_names, adapter_weights)
        for key in {key for weight in weights if isinstance(weight, dict) for key in weight}:
            if key not in PARTS:
                raise ValueError(f"weights of adapters are for {' and '.join(PARTS)}, got {key!r}")
        known = self.get_list_adapters()
        found = sorted({name for own in known.values() for name in own})
        if unknown := sorted(set(names) - set(found)):
            raise ValueError(f"the pipeline has no adapter {unknown[0]!r}; it has: {', '.join(found) or 'none'}")
        for part, own in known.items():
            chosen = [
                (name, weight.get(part) if isinstance(weight, dict) else weight)
                for name, weight in zip(names, weights, strict=True)
                if name in own
            ]
            given, own_weights = [name for name, _ in chosen], [weight for _, weight in chosen]
            if part == "flow":
                self.flow.set_adapters(given, own_weights)
            elif given:
                set_adapters_for_text_encoder(given, self.text_encoder, own_weights)
            else:
                for layer in adapter_layers(getattr(self, part)).values():
                    layer.set_adapter([])

    def fuse_lora(self, components: list[str] | None = None, **options: Any) -> None:
        """Make adapters a part of the weights; see Diffusers. Components are those that have adapters if not given."""
        check_flow_kind(self.flow, "adapters are")
        super().fuse_lora(components or list(self.get_list_adapters()) or ["flow"], **options)

    def unfuse_lora(self, components: list[str] | None = None, **options: Any) -> None:
        """Take adapters out of the weights again; see Diffusers."""
        check_flow_kind(self.flow, "adapters are")
        super().unfuse_lora(components or list(self.get_list_adapters()) or ["flow"], **options)

    def disable_lora(self) -> None:
        """Let adapters have no effect, until `enable_lora`."""
        check_flow_kind(self.flow, "adapters are")
        super().disable_lora()

    def enable_lora(self) -> None:
        """Let the active adapters have their effect again."""
        check_flow_kind(self.flow, "adapters are")
        super().enable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Take adapters out; without any left the layers are plain ones again.

        Raises:
            ValueError: for weights that are offloaded to files.
        """
        check_flow_kind(self.flow, "adapters are")
        refuse_changes(self)
        super().delete_adapters(adapter_names)
        encoder = self.text_encoder
        if isinstance(encoder, nn.Module):
            if not getattr(encoder, "peft_config", None):
                recurse_remove_peft_layers(encoder)
            _maybe_remove_and_reapply_group_offloading(encoder)

    def unload_lora_weights(self) -> None:
        """Take all adapters out; a trajectory model has none, so that nothing is done.

        Raises:
            ValueError: for weights that are offloaded to files.
        """
        if isinstance(self.flow, TrajectoryFlowModel):
            return  # it has none
        refuse_changes(self)
        super().unload_lora_weights()
        if isinstance(self.text_encoder, nn.Module):
            _maybe_remove_and_reapply_group_offloading(self.text_encoder)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As of `PipelineFiles`, for a pipeline without adapters.

        Raises:
            ValueError: if it has some.
        """
        for part in PARTS:
            if isinstance(getattr(self, part), nn.Module):
                refuse_adapters(part.replace("_", " "), getattr(self, part))
        super().save_pretrained(save_directory, *args, **kwargs)


def refuse_changes(pipe: DiffusionPipeline) -> None:
    """An error if a part has adapters and its weights are offloaded to files, before another part is changed."""
    for part in PARTS:
        model = getattr(pipe, part)
        if isinstance(model, nn.Module) and adapter_layers(model):
            refuse_offloading_to_files(model)


def with_prefixes(
    state: dict[str, Tensor], metadata: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
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

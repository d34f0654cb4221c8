"""What goes on around the loading of a pipeline's adapters, and loading those of a text encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedModel

from tarflow.flows.adapters.changes import adapter_layers, follow_mode


def load_into_text_encoder(
    encoder: PreTrainedModel, state: dict[str, Tensor], metadata: dict[str, Any] | None, adapter_name: str
) -> None:
    """Add an adapter to a text encoder, of any class of Transformers.

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
    inject_adapter_in_model(config, encoder, adapter_name=adapter_name, state_dict=state)
    encoder._hf_peft_config_loaded = True
    left = set_peft_model_state_dict(encoder, state, adapter_name).unexpected_keys
    for layer in adapter_layers(encoder).values():
        layer.set_adapter(adapter_name, inference_mode=True)
    follow_mode(encoder)
    if left:
        raise ValueError(f"the pipeline's text encoder has no layer for {left[0]!r}: the adapter is of another one")


@contextmanager
def without_offloading(pipe: DiffusionPipeline) -> Iterator[None]:
    """Remove Accelerate's offloading hooks from a pipeline for a while. They come back at the end, also after an error, and
    cover new layers too. Group offloading stays, see `changing_adapters`."""
    whole_parts, layers, _ = pipe._optionally_disable_offloading(pipe)
    device = getattr(pipe, "_offload_device", None)
    try:
        yield
    finally:
        if whole_parts:
            pipe.enable_model_cpu_offload(device=device)
        elif layers:
            pipe.enable_sequential_cpu_offload(device=device)


@contextmanager
def refused_in_a_sentence() -> Iterator[None]:
    """Turn the libraries' errors about weights of other shapes, names or settings into one sentence.

    Raises:
        ValueError: in its place.
    """
    try:
        yield
    except (RuntimeError, KeyError, IndexError, TypeError) as error:
        if "memory" in str(error):
            raise
        # The first line of several is a heading.
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        raise ValueError(f"these adapters do not fit the pipeline: {lines[:2][-1]}{more}") from error

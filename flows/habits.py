"""What flows and students do of what Diffusers' models do, beside what `ModelMixin` gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils import BaseOutput
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from torch import Tensor

from tarflow.common.dtypes import kept_default_dtype
from tarflow.flows.layers.network import recomputed
from tarflow.flows.layers.prepared import check_saved_whole

# What this goes before; not a base of its own, as it comes after `FlowAdapters` and before `ModelMixin`.
if TYPE_CHECKING:
    from diffusers import ModelMixin as Model
else:
    Model = object


@dataclass
class FlowOutput(BaseOutput):
    """What `TARFlowModel.forward` returns with ``return_dict=True``.

    Attributes:
        z: (B, C, H, W).
        log_det: log|det dz/dx| (B,).
        block_outputs: (B, C, H, W) each, or None.
    """

    z: Tensor
    log_det: Tensor
    block_outputs: list[Tensor] | None = None


@dataclass
class StudentOutput(BaseOutput):
    """What `StudentModel.forward` returns with ``return_dict=True``.

    Attributes:
        sample: latents (B, C, H, W).
        states: (B, C, H, W) each, or None.
    """

    sample: Tensor
    states: list[Tensor] | None = None


class NetworkHabits(Model):
    """Goes before `ModelMixin` among a model's bases."""

    _supports_gradient_checkpointing = True
    #: Whether `device_map` may name one accelerator only.
    _on_one_accelerator = False

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As of `ModelMixin`; an error leaves the process's default dtype as it was.

        Raises:
            ValueError: with ``parallel_config``, see `enable_parallelism`; for a flow with a ``device_map`` of several
                accelerators.
        """
        if options.get("parallel_config") is not None:
            refuse_parallelism(cls)
        places = options.get("device_map")
        if cls._on_one_accelerator and isinstance(places, dict):
            check_one_accelerator(cls, places)
        with kept_default_dtype():
            loaded = super().from_pretrained(*args, **options)
        if cls._on_one_accelerator:  # what "auto" and the like have become
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            check_one_accelerator(cls, getattr(model, "hf_device_map", None) or {})
        return loaded

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look at the signature for what they may pass
    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """As of `ModelMixin`.

        Raises:
            ValueError: for weights that are offloaded to places where only a forward pass finds them.
        """
        check_saved_whole(self)
        return super().save_pretrained(save_directory, *args, **options)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Keep only the inputs of the Transformer layers for the backward pass, which computes the rest again.

        Args:
            gradient_checkpointing_func: called with a layer and its inputs; None takes PyTorch's checkpoint.
        """
        super().enable_gradient_checkpointing(gradient_checkpointing_func or recomputed)

    def reset_attention_backend(self) -> None:
        """Go back to the default: DIFFUSERS_ATTN_BACKEND if it is set, else the fastest. `set_attention_backend` also
        sets the backend of the whole process, which this undoes."""
        super().reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName(DIFFUSERS_ATTN_BACKEND))

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> NoReturn:
        """Is not supported.

        Raises:
            ValueError: always.
        """
        refuse_parallelism(type(self))


def check_one_accelerator(kind: type, places: dict[str, Any]) -> None:
    """Refuse a map of modules to devices that names several accelerators.

    Raises:
        ValueError: if it does.
    """
    devices = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in places.values()}
    found = sorted({"cuda:0" if one == "cuda" else one for one in devices} - {"cpu", "cpu:0", "disk", "meta"})
    if len(found) > 1:
        raise ValueError(
            f"device_map puts this {kind.__name__} on {len(found)} accelerators ({', '.join(found)}), and it computes on one "
            "only: name one of them, beside 'cpu' and 'disk', or give max_memory for one"
        )


def refuse_parallelism(kind: type) -> NoReturn:
    """The error for context and tensor parallelism."""
    raise ValueError(
        f"{kind.__name__} has no context or tensor parallelism, as a token needs all tokens before it: draw other "
        "images in other processes, and train with DDP or FSDP2 (docs/training.md)"
    )

"""Accelerate as this project wants it: several processes, sharded or not, from the launcher's settings."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn

from tarflow.data.latents import CachedLatents
from tarflow.training.loop.agreement import agreed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Drawing a grid on one process, or writing a large checkpoint, may keep the others waiting longer than ten minutes.
TIMEOUT = timedelta(hours=2)


def processes_on_cpus() -> bool:
    """Whether a launcher started this process on a machine without an accelerator. Accelerate must be told, or each of
    several processes would run alone."""
    return "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()


def started_processes() -> PartialState:
    """The processes of work other than training, by the launcher's settings; this one alone without a launcher."""
    return PartialState(cpu=processes_on_cpus() or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)


def sharding(mixed_precision: str) -> FullyShardedDataParallelPlugin:
    """FSDP2 with the launcher's settings and this project's precision: the network's weights are cast; gradients are
    summed in float32, and latents, affine maps and losses stay float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Inputs and outputs are cast by the network itself, which knows what stays in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES.get(mixed_precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def shard_layers(accelerator: Accelerator, text_encoder: nn.Module) -> None:
    """Have the layers of a text encoder divided one by one too, when the model that it is part of is prepared."""
    plugin = accelerator.state.fsdp_plugin
    names = [*(plugin.transformer_cls_names_to_wrap or ()), *layer_classes(text_encoder)]
    plugin.transformer_cls_names_to_wrap = list(dict.fromkeys(names))


def layer_classes(text_encoder: nn.Module) -> list[str]:
    """Names of the classes of a Transformer's layers: what its outermost lists of modules are made of."""
    found: set[str] = set()
    inner: set[nn.Module] = set()
    for module in text_encoder.modules():  # outer ones come first
        if isinstance(module, nn.ModuleList) and module not in inner:
            found |= {type(layer).__name__ for layer in module}
            inner |= {part for layer in module for part in layer.modules()}
    return sorted(found)


def verify_caches(accelerator: Accelerator, *splits: object) -> None:
    """Each process reads its share of the cached latents' files and compares checksums.

    Raises:
        ValueError: on all processes, if a file is corrupt.
    """
    for split in splits:
        if isinstance(split, CachedLatents):
            agreed(accelerator, partial(split.verify, accelerator.process_index, accelerator.num_processes))


def forget_gathered(model: nn.Module) -> None:
    """Have a divided model gather its weights anew at the next pass. A pass without gradients leaves those outside the
    layers gathered, and the pass after it would take them although the weights were changed meanwhile."""
    if not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule  # imported here: it takes its time, and few need it

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_weights(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole model's weights by name, on the main process; the others get an empty dictionary, but must call it."""
    state = accelerator.get_state_dict(model)
    return state if accelerator.is_main_process else {}

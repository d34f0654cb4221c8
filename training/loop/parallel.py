"""Accelerate as this project wants it: several processes, sharded or not, from the launcher's settings."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import nn

from tarflow.data.latents import CachedLatents
from tarflow.training.flow.config import RunConfig, has_denoiser, is_joint
from tarflow.training.loop.checkpoint import agreed_error
from tarflow.training.loop.launcher import accumulating, check_launcher, check_trackers, is_on, uncompiled

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Drawing a grid on one process, or writing a large checkpoint, may keep the others waiting longer than ten minutes.
TIMEOUT = timedelta(hours=2)


def make_accelerator(config: RunConfig) -> Accelerator:
    """The run's accelerator.

    Raises:
        ValueError: if the launcher wants what this training does not know, or a tracker is not there.
    """
    train = config.train
    check_launcher(train.mixed_precision, train.accumulation, "train.", compiles=True)
    check_trackers(config.log.trackers, "log.trackers")
    waiting, cpu = InitProcessGroupKwargs(timeout=TIMEOUT), processes_on_cpus()
    plugin = None
    if is_on("ACCELERATE_USE_FSDP"):
        plugin = sharding(train.mixed_precision)
        if train.checkpointing != "none":
            plugin.activation_checkpointing = False  # the run's own setting takes its place
        state = PartialState(cpu=cpu, timeout=TIMEOUT)
        if state.distributed_type is DistributedType.MULTI_CPU:
            # Accelerate shards on accelerators only, although gloo can do it on CPUs, where it can be tried and tested.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(
        cpu=cpu,
        mixed_precision=train.mixed_precision,
        dynamo_plugin=uncompiled(),
        gradient_accumulation_plugin=accumulating(train.accumulation),
        log_with=config.log.trackers or None,
        project_dir=str(Path(config.output)),
        # With a learned denoiser each forward pass leaves out one of the two networks.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=has_denoiser(config)), waiting],
        fsdp_plugin=plugin,
    )


def processes_on_cpus() -> bool:
    """Whether a launcher started this process on a machine without an accelerator. Accelerate must be told: it would
    take each of several processes for the only one."""
    return "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()


def sharding(mixed_precision: str) -> FullyShardedDataParallelPlugin:
    """FSDP2 as the launcher's settings have it, with this project's precision: the network's weights are cast, while
    gradients are summed, and latents, affine maps and losses stay, in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Inputs and outputs are cast by the network itself, which knows what stays in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES.get(mixed_precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
    return plugin


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


def check_parallel(accelerator: Accelerator, config: RunConfig) -> None:
    """Errors of settings that do not fit the way in which processes share the work."""
    if accelerator.is_fsdp2 and has_denoiser(config) and config.train.accumulation > 1:
        raise ValueError(
            "under FSDP a learned denoiser cannot be trained with train.accumulation above 1: raise train.batch_size "
            "instead, or use --config_file $(tarflow configs accelerate/ddp)"
        )
    if accelerator.is_fsdp2 and config.lora.rank:
        raise ValueError("an adapter (lora.rank) cannot be trained sharded (FSDP): use configs/accelerate/ddp.yaml")
    if accelerator.is_fsdp2 and is_joint(config):
        raise ValueError(
            "vae.train 'joint' cannot be sharded (FSDP): use --config_file $(tarflow configs accelerate/ddp)"
        )
    if accelerator.is_fsdp2 and config.train.checkpointing == "reversible":
        raise ValueError(
            "under FSDP weights are not whole in the backward pass, which train.checkpointing 'reversible' needs: use "
            "'block', or use --config_file $(tarflow configs accelerate/ddp)"
        )
    if config.text.shard and not accelerator.is_fsdp2:
        raise ValueError(
            "text.shard is true, but this is no FSDP run: start it with --config_file $(tarflow configs accelerate/fsdp2)"
        )


def verify_caches(accelerator: Accelerator, *splits: Any) -> None:
    """Each process reads its share of the cached latents' files and compares checksums.

    Raises:
        ValueError: on all processes, if a file is corrupt.
    """
    for split in splits:
        if isinstance(split, CachedLatents):
            share = partial(split.verify, accelerator.process_index, accelerator.num_processes)
            if error := agreed_error(accelerator, share):
                raise ValueError(error)


def full_weights(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole model's weights by name, on the main process; the others get an empty dictionary, but must call it."""
    state = accelerator.get_state_dict(model)
    return state if accelerator.is_main_process else {}

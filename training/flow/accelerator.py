"""The accelerator of a flow's training, and what it cannot do."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)

from tarflow.training.flow.config import RunConfig, has_denoiser, is_joint
from tarflow.training.loop.launcher import accumulating, check_launcher, check_trackers, is_on, uncompiled
from tarflow.training.loop.parallel import TIMEOUT, processes_on_cpus, sharding


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

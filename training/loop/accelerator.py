"""The accelerator of a run, made of its settings and the launcher's."""

from __future__ import annotations

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    set_seed,
)

from tarflow.common.checks import check
from tarflow.common.memory import keep_freed_memory
from tarflow.training.loop.config import LoopSettings
from tarflow.training.loop.launcher import accumulating, check_launcher, is_on, uncompiled
from tarflow.training.loop.parallel import TIMEOUT, processes_on_cpus, sharding
from tarflow.training.loop.trackers import check_trackers


def make_accelerator(
    settings: LoopSettings,
    shards: bool = False,
    compiles: bool = False,
    checkpoints_activations: bool = False,
    leaves_out_parts: bool = False,
) -> Accelerator:
    """The accelerator; it seeds everything, and on a CPU has freed memory kept.

    Args:
        settings: of the run.
        shards: whether what is trained can be divided among processes, by FSDP.
        compiles: whether it obeys the launcher's dynamo settings.
        checkpoints_activations: whether it does so itself, in the place of FSDP's own way.
        leaves_out_parts: whether some passes leave out a part of the model, for which DDP must look.

    Raises:
        ValueError: if the launcher wants what this training does not know, a tracker is not there, or fp16 is for a CPU.
    """
    train, trackers = settings.train, settings.log.trackers
    if is_on("ACCELERATE_USE_FSDP") and not shards:
        raise ValueError("this network is not sharded: start with --config_file $(tarflow configs accelerate/ddp)")
    check_launcher(train.mixed_precision, train.accumulation, settings.name("train", ""), compiles)
    check_trackers(trackers, settings.name("log", "trackers"))
    waiting, cpu = InitProcessGroupKwargs(timeout=TIMEOUT), processes_on_cpus()
    plugin = None
    if is_on("ACCELERATE_USE_FSDP"):
        plugin = sharding(train.mixed_precision)
        if checkpoints_activations:
            plugin.activation_checkpointing = False  # the run's own setting takes its place
        state = PartialState(cpu=cpu, timeout=TIMEOUT)
        if state.distributed_type is DistributedType.MULTI_CPU:
            # Accelerate shards on accelerators only, although gloo can do it on CPUs, where it can be tried and tested.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=train.mixed_precision,
        dynamo_plugin=uncompiled(),
        gradient_accumulation_plugin=accumulating(train.accumulation),
        log_with=trackers or None,
        project_dir=str(settings.folder),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=leaves_out_parts), waiting],
        fsdp_plugin=plugin,
    )
    check(
        train.mixed_precision != "fp16" or accelerator.device.type != "cpu",
        f"{settings.name('train', 'mixed_precision')} fp16 is for GPUs, and training on a CPU would be in float32: take bf16 or no",
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    set_seed(train.seed)
    return accelerator

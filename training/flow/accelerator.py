"""The accelerator of a flow's training, and what it cannot do."""

from __future__ import annotations

from accelerate import Accelerator

from tarflow.training.flow.config import RunConfig, has_denoiser, is_joint
from tarflow.training.loop.accelerator import make_accelerator


def flow_accelerator(config: RunConfig) -> Accelerator:
    """The run's accelerator.

    Raises:
        ValueError: if the launcher wants what this training does not know, or a tracker is not there.
    """
    accelerator = make_accelerator(
        config.loop,
        shards=True,
        compiles=True,
        checkpoints_activations=config.train.checkpointing != "none",
        leaves_out_parts=has_denoiser(config),  # each forward pass leaves out one of the two networks
    )
    check_parallel(accelerator, config)
    return accelerator


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

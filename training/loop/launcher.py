"""Settings of Accelerate's launcher, from its configuration file and environment variables. A run obeys or refuses
them; none changes a run silently."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import DynamoBackend, GradientAccumulationPlugin, TorchDynamoPlugin

from tarflow.common.checks import check

#: Ways to train that the loops do not know, by the variable that turns them on.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration (tensor, context or sequence parallelism)",
    "ACCELERATE_USE_TP": "tensor parallelism",
}


def check_launcher(mixed_precision: str, accumulation: int, section: str = "", compiles: bool = False) -> None:
    """Errors of the launcher's settings that this run would not obey.

    Args:
        mixed_precision, accumulation: of the run, which count.
        section: in which the run has them, "train." or none.
        compiles: whether it obeys the launcher's dynamo settings, see `launcher_compilation`.

    Raises:
        ValueError: that names the first one, and what to do.
    """
    for name, what in REFUSED.items():
        check(
            not is_on(name),
            f"the launcher wants {what}, which is not supported: start with --config_file $(tarflow configs "
            "accelerate/ddp) or, for the flow, accelerate/fsdp2",
        )
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    check(
        wanted in ("", "no", mixed_precision),
        f"the launcher wants mixed precision {wanted!r}, but {section}mixed_precision is {mixed_precision!r}, which "
        "counts: set both to the same, or the launcher's to 'no'",
    )
    passes = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "").lower()
    check(
        passes in ("", "auto", "1", str(accumulation)),
        f"the launcher wants {passes} gradient accumulation steps, but {section}accumulation is {accumulation}, which "
        f"counts: set {section}accumulation, and leave ACCELERATE_GRADIENT_ACCUMULATION_STEPS out",
    )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").lower()
    check(
        compiles or backend in ("", "no"),
        f"the launcher wants dynamo_backend {backend!r}, but this network is not compiled: leave it out",
    )
    if is_on("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        check(version == "2", f"FSDP must be version 2 (fsdp_version: 2), got {version}")
        check(
            not is_on("FSDP_OFFLOAD_PARAMS"),
            "fsdp_offload_params is not supported: set it to false in the launcher's configuration",
        )
        ignored = os.environ.get("FSDP_IGNORED_MODULES", "")
        check(
            ignored in ("", "None"),
            f"fsdp_ignored_modules is {ignored!r}: the gradients of such modules would not be summed; leave it out",
        )


def is_on(name: str) -> bool:
    """Whether an environment variable is set to yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t")


def launcher_compilation() -> dict[str, Any] | None:
    """Arguments of ``torch.compile`` as the launcher's dynamo settings have them, None if they are off."""
    plugin = TorchDynamoPlugin()
    if plugin.backend is DynamoBackend.NO:
        return None
    return {**plugin.to_kwargs(), "backend": plugin.backend.value.lower()}


def uncompiled() -> TorchDynamoPlugin:
    """Accelerate compiles nothing itself: whole models, under other names, could not be saved."""
    return TorchDynamoPlugin(backend="no")


def accumulating(passes: int) -> GradientAccumulationPlugin:
    """Gradients of so many passes make a step, whatever the environment says."""
    return GradientAccumulationPlugin(num_steps=passes)

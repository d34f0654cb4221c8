"""What a run is made of beside its parts: actnorms set by data, held-out pictures, the metric of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate import Accelerator

from tarflow.training.flow.config import RunConfig
from tarflow.training.flow.inputs import InputMaker
from tarflow.training.flow.objective import FlowObjective
from tarflow.training.flow.report import HeldOut
from tarflow.training.flow.setup import Parts
from tarflow.training.loop.batches import fixed_batches, read_batches

if TYPE_CHECKING:
    from tarflow.training.flow.metric import SampleMetric

#: Training pictures by which actnorms are set before the first step.
ACTNORM_IMAGES = 256


def initialize_actnorm(objective: FlowObjective, inputs: InputMaker, parts: Parts) -> None:
    """Set the flow's actnorms, if it has any, by latents of training pictures, the same on every process."""
    if parts.flow.config.get("actnorm", False):
        places = fixed_batches(parts.train, ACTNORM_IMAGES, ACTNORM_IMAGES)[0]
        objective.to(inputs.device)
        batch, *_ = read_batches(parts.train, places)
        count = len(batch["image"] if "image" in batch else batch["latent_mean"])
        objective.initialize_actnorm(**inputs.evaluation(batch, places[:count]))


def open_held_out(config: RunConfig, parts: Parts, accelerator: Accelerator) -> HeldOut | None:
    """This process's held-out pictures."""
    if parts.validation is None:
        return None
    count, size = config.log.eval_images, config.train.batch_size
    return HeldOut(parts.validation, count, size, accelerator.process_index, accelerator.num_processes)


def open_metric(config: RunConfig, parts: Parts, accelerator: Accelerator) -> SampleMetric | None:
    """What measures samples, on the main process.

    Raises:
        ValueError: if less than two pictures are held out, or pictures of several shapes.
    """
    if config.metric.every == 0 or not accelerator.is_main_process:
        return None
    if parts.validation is None:
        raise ValueError("metric.every is set, but nothing is held out: raise data.validation_fraction")
    if (count := len(parts.validation)) < 2:
        raise ValueError(f"metric.every is set, but only {count} picture is held out: raise data.validation_fraction")
    if len(groups := getattr(parts.validation, "groups", ())) > 1:
        raise ValueError(
            f"metric.every is for pictures of one shape, but those held out have {len(groups)}: set it to 0, and compare the "
            "pipeline's samples by tarflow evaluate fid"
        )
    from tarflow.training.flow.metric import SampleMetric  # imported here: few runs need its libraries

    return SampleMetric(config.metric, parts.validation, accelerator.device)

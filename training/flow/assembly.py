"""What a run's loop is made of: the objective, the stepper, held-out pictures."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from tarflow.training.flow.config import RunConfig, is_joint
from tarflow.training.flow.inputs import InputMaker
from tarflow.training.flow.joint import JointObjective
from tarflow.training.flow.joint_step import JointStepper
from tarflow.training.flow.objective import FlowObjective
from tarflow.training.flow.report import HeldOut
from tarflow.training.flow.setup import Parts
from tarflow.training.flow.step import Stepper
from tarflow.training.loop.batches import fixed_batches, read_batch

#: Training pictures by which actnorms are set before the first step.
ACTNORM_IMAGES = 256


def make_objective(config: RunConfig, parts: Parts, text_encoder: nn.Module | None) -> FlowObjective:
    """What is minimised: of the flow, the autoencoder if it is trained along, and a text encoder that is."""
    if is_joint(config):
        return JointObjective(parts.flow, text_encoder, parts.codec, config.joint)
    return FlowObjective(parts.flow, text_encoder, config.text.hidden_layer)


def initialize_actnorm(objective: FlowObjective, inputs: InputMaker, parts: Parts) -> None:
    """Set the flow's actnorms, if it has any, by latents of training pictures, the same on every process."""
    if parts.flow.config.actnorm:
        places = fixed_batches(parts.train, ACTNORM_IMAGES, ACTNORM_IMAGES)[0]
        objective.to(inputs.device)
        objective.initialize_actnorm(**inputs.evaluation(read_batch(parts.train, places), places))


def make_stepper(objective: FlowObjective, config: RunConfig, *rest: Any) -> Stepper:
    """What takes the steps; ``rest`` as of `Stepper`."""
    return JointStepper(objective, config, *rest) if is_joint(config) else Stepper(config, *rest)


def open_held_out(config: RunConfig, parts: Parts, accelerator: Accelerator) -> HeldOut | None:
    """This process's held-out pictures."""
    if parts.validation is None:
        return None
    count, size = config.log.eval_images, config.train.batch_size
    return HeldOut(parts.validation, count, size, accelerator.process_index, accelerator.num_processes)


def open_metric(config: RunConfig, parts: Parts, accelerator: Accelerator) -> Any:
    """What measures samples, on the main process.

    Raises:
        ValueError: if nothing is held out.
    """
    if config.metric.every == 0 or not accelerator.is_main_process:
        return None
    if parts.validation is None:
        raise ValueError("metric.every is set, but nothing is held out: raise data.validation_fraction")
    from tarflow.training.flow.metric import SampleMetric  # imported here: few runs need its libraries

    return SampleMetric(config.metric, parts.validation, accelerator.device)

"""A run of a network other than the flow, from its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator

from tarflow.training.loop.accelerator import make_accelerator
from tarflow.training.loop.network_config import NetworkConfig
from tarflow.training.loop.network_task import NetworkTask
from tarflow.training.loop.trainer import Trainer

Config = TypeVar("Config", bound=NetworkConfig)


def network_trainer(task: Callable[[Config, Accelerator], NetworkTask], config: Config, resolved: str) -> Trainer:
    """One run: `network_trainer(task, config, resolved).run()`.

    Args:
        task: makes what is trained of the settings and the run's accelerator.
        config: the settings.
        resolved: their YAML, saved with the run.

    Raises:
        ValueError: if settings, data and weights do not fit each other, or the checkpoint to resume from.
    """
    settings = config.loop(config.folder)
    accelerator = make_accelerator(settings)
    return Trainer(settings, resolved, accelerator, task(config, accelerator))

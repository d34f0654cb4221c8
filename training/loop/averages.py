"""Exponential moving averages of the weights, several decays at once, sharded like the weights themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers.training_utils import EMAModel

from tarflow.training.loop.reading import reading


class WeightAverages:
    """Averages of some parameters.

    Args:
        parameters: as the optimizer has them, after Accelerate has prepared them.
        decays: one for each average; in the first steps it is lower, (1 + n) / (10 + n) after n.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decays: Sequence[float]):
        self.parameters, self.decays = list(parameters), list(decays)
        self.models = [EMAModel(self.parameters, decay=decay, foreach=True) for decay in decays]

    @property
    def steps(self) -> int:
        return self.models[0].optimization_step

    def step(self) -> None:
        """Take in the parameters after an optimizer step."""
        for model in self.models:
            model.step(self.parameters)

    @contextmanager
    def applied(self, number: int = 0) -> Iterator[None]:
        """The parameters are those of one average, and afterwards as before."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._copy(self.models[number].shadow_params)
            yield
        finally:
            self._copy(kept)

    def save(self, folder: Path) -> None:
        """Write all averages; every process calls this. Any number of processes, sharded or not, can load them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process: all is well
            dcp.save(self._tensors(), checkpoint_id=folder, no_dist=not dist.is_initialized())

    def load(self, folder: Path, steps: int) -> None:
        """Read what `save` wrote after so many steps."""
        state = self._tensors()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            with reading(folder):
                dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        for name, model in zip(state, self.models, strict=True):
            model.shadow_params = list(state[name].values())
            model.optimization_step = steps

    @torch.no_grad()
    def _copy(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):  # sharded ones cannot be copied together
            parameter.copy_(value)

    def _tensors(self) -> dict[str, Any]:
        return {
            f"ema_{decay}": {str(place): tensor for place, tensor in enumerate(model.shadow_params)}
            for decay, model in zip(self.decays, self.models, strict=True)
        }

"""The stochastic walk from one noise level down to the next, as a scheduler of Diffusers' kind. The deterministic one is
Diffusers' own `EDMEulerScheduler` with ``rho=1``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EDMEulerScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


# Diffusers loads a part that it finds to be of a class that this module names: of `SchedulerMixin`.
class EDMAncestralScheduler(EDMEulerScheduler, SchedulerMixin):
    """`EDMEulerScheduler` with fresh noise at each level (iTARFlow, arXiv 2604.20041; Euler's ancestral step):
    x ← x0 + s'·(√α·(x − x0)/s + √(1 − α)·ε), α = (s'/s)², from level s to s'. The step to 0 gives x0."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
        **_: Any,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, Tensor]:
        """One level down.

        Args:
            model_output: of a network as EDM preconditions it; not read where ``pred_original_sample`` is given.
            timestep: one of ``timesteps``.
            sample: x (B, …), with noise of the level.
            generator: one, or one for each sample.
            pred_original_sample: x0 (B, …).
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        level, lower = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        sample = sample.float()
        if pred_original_sample is None:
            pred_original_sample = self.precondition_outputs(sample, model_output, level)
        share = lower / level  # √α
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        direction = share * (sample - pred_original_sample) / level + (1 - share**2).sqrt() * noise
        made = (pred_original_sample + lower * direction).to(model_output.dtype)
        self._step_index += 1
        if not return_dict:
            return made, pred_original_sample
        return EDMEulerSchedulerOutput(prev_sample=made, pred_original_sample=pred_original_sample)

"""One optimizer step, of whatever is trained: when gradients change the weights, and when they are left out."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tarflow.training.loop.averages import WeightAverages
from tarflow.training.loop.config import LoopSettings
from tarflow.training.loop.schedule import peak_factor, schedule_factor, warmup_steps
from tarflow.training.loop.task import Batch, Learner, Task


class Stepper:
    """Takes optimizer steps.

    Args:
        settings: of the run.
        accelerator: which has prepared what learns.
        task: what is trained; it gives the gradients.
        averages: of the parameters of the task's ``learner``.

    Attributes:
        bad_steps: how many of the last steps, in a row, were not finite.
        spikes: how many steps were left out for their gradient norm.
        skipped: messages of unreadable pictures.
        waited, seconds: for data, and for whole steps.
    """

    def __init__(self, settings: LoopSettings, accelerator: Accelerator, task: Task, averages: WeightAverages):
        self.settings, self.accelerator, self.task, self.averages = settings, accelerator, task, averages
        self.bad_steps = self.spikes = 0
        self.skipped: set[str] = set()
        self.waited = self.seconds = 0.0

    def take(self, batches: Iterator[Batch], step: int, total: int) -> dict[str, Tensor]:
        """One optimizer step; the host waits for the device once, for the gradient's norm.

        Args:
            batches: this process's, one for each forward pass.
            step: its number.
            total: steps of the run, for the learning rate.

        Returns:
            this process's loss, its parts and the gradient's norm.
        """
        accelerator, passes, begun = self.accelerator, self.settings.train.accumulation, time.perf_counter()
        learners = self.task.learners(step)
        self.set_learning_rates(learners, step, total)
        learners[0].model.train()
        self.task.begin_step(step)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
        norms = [torch.tensor(0.0)]
        for part in range(passes):
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            self.skipped.update(batch["skipped"])
            with accelerator.accumulate(*(learner.model for learner in learners)):
                for name, value in self.task.backward(batch, step, total, self.sample_ids(part)).items():
                    sums[name] += value
                if accelerator.sync_gradients:
                    norms = [self.clip_gradients(learner) for learner in learners]
                    self.update(learners, norms, sums["loss"] / passes, step)
        self.seconds += time.perf_counter() - begun
        return {name: value / passes for name, value in sums.items()} | {"grad_norm": norms[0].detach()}

    def sample_ids(self, part: int) -> range:
        """Numbers of this process's pictures of a pass in the step's batch."""
        size, accelerator = self.settings.train.batch_size, self.accelerator
        first = (part * accelerator.num_processes + accelerator.process_index) * size
        return range(first, first + size)

    def set_learning_rates(self, learners: list[Learner], step: int, total: int) -> None:
        """Give each optimizer group its rate of this step: the schedule's, or a constant one."""
        optim, images = self.settings.optim, self.settings.images_per_step(self.accelerator.num_processes)
        factor = schedule_factor(step, total, warmup_steps(optim, images), optim) * peak_factor(optim, images)
        for learner in learners:
            for group in learner.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor if learner.lr is None else learner.lr

    def clip_gradients(self, learner: Learner) -> Tensor:
        """Clip each optimizer group by itself, but together those that were one group; returns the largest norm."""
        limit, clipped = self.settings.optim.max_grad_norm, defaultdict[int, list[nn.Parameter]](list)
        for number, group in enumerate(learner.optimizer.param_groups):
            clipped[group.get("clip_with", number)] += group["params"]
        if len(clipped) == 1:
            norms = [self.accelerator.clip_grad_norm_(learner.model.parameters(), limit)]
        else:  # Accelerate would unscale gradients of fp16 for each group
            self.accelerator.unscale_gradients()
            norms = [torch.nn.utils.clip_grad_norm_(parameters, limit) for parameters in clipped.values()]
        return torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).max()

    def update(self, learners: list[Learner], norms: list[Tensor], loss: Tensor, step: int) -> None:
        """Change the weights, unless a gradient is not finite, or the first network's is larger than wished.

        Args:
            learners: what learns in this step.
            norms: of their gradients.
            loss: of the step, mean over its passes.
            step: its number.
        """
        scaler, limit, size = self.accelerator.scaler, self.settings.optim.skip_grad_norm, float(norms[0])
        finite = math.isfinite(size) and all(math.isfinite(float(norm)) for norm in norms[1:])
        spike = limit is not None and finite and size > limit
        self.spikes += spike
        if (finite or scaler is not None) and not spike:
            for learner in learners:
                learner.optimizer.step()  # with fp16 the scaler leaves out what is not finite, and lowers its scale
        elif scaler is not None:
            scaler.update()  # which it expects before gradients are unscaled again
        if finite and not spike and not learners[0].optimizer.step_was_skipped:
            self.averages.step()
            self.task.after_update(step)
        for learner in learners:
            learner.optimizer.zero_grad()
        # Gradients of fp16 may overflow for some steps, until the scale fits; losses may not.
        self.count_bad_step(finite or (scaler is not None and math.isfinite(float(loss))), loss, step)

    def count_bad_step(self, finite: bool, loss: Tensor, step: int) -> None:
        """Stop after too many losses or gradients in a row that are not finite."""
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= self.settings.max_bad_steps:
            name = self.settings.name("optim", "lr")
            raise ValueError(
                f"training stopped at step {step}: loss {float(loss)} or its gradient was not finite in "
                f"{self.bad_steps} steps in a row; lower {name} ({self.settings.optim.lr}) or resume from a checkpoint"
            )

"""One optimizer step, of whatever is trained: when gradients change the weights, and when they are left out."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
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
        self.waits = not can_go_on(accelerator, task)
        self.pending: Pending | None = None

    def take(self, batches: Iterator[Batch], step: int, total: int) -> dict[str, Tensor]:
        """One optimizer step. On a GPU whether it was finite is decided there, and counted with the next step, so that the
        host goes on meanwhile; else the host waits for the gradient's norm.

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
                    goes_on = not self.waits and all(leaves_out(learner.optimizer) for learner in learners)
                    update = self.update_on_device if goes_on else self.update
                    update(learners, norms, sums["loss"] / passes, step)
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
        self.settle()
        for learner in learners:
            if leaves_out(learner.optimizer):  # which may have been told by a step before
                inner_of(learner.optimizer).found_inf = None
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

    def update_on_device(self, learners: list[Learner], norms: list[Tensor], loss: Tensor, step: int) -> None:
        """As `update`, without waiting: optimizers leave out what is not finite, or too large, themselves."""
        limit = self.settings.optim.skip_grad_norm
        finite = torch.stack([norm.detach() for norm in norms]).isfinite().all()
        spike = finite & (norms[0] > limit) if limit is not None else torch.zeros_like(finite)
        flags = torch.stack([finite, spike])
        self.settle()  # the averages take the weights of the step before, which change now
        for learner in learners:
            inner_of(learner.optimizer).found_inf = (~finite | spike).float()
            learner.optimizer.step()
            learner.optimizer.zero_grad()
        self.pending = Pending(flags, loss.detach(), step)

    def settle(self) -> None:
        """Take into account whether the last step changed the weights: averages, counts, and an end after too many that
        were not finite. Before anything reads or saves the averages."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        finite, spike = pending.read()
        self.spikes += spike
        if finite and not spike:
            self.averages.step()
            self.task.after_update(pending.step)
        self.count_bad_step(finite, pending.loss, pending.step)

    def count_bad_step(self, finite: bool, loss: Tensor, step: int) -> None:
        """Stop after too many losses or gradients in a row that are not finite."""
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= self.settings.max_bad_steps:
            name = self.settings.name("optim", "lr")
            raise ValueError(
                f"training stopped at step {step}: loss {float(loss)} or its gradient was not finite in "
                f"{self.bad_steps} steps in a row; lower {name} ({self.settings.optim.lr}) or resume from a checkpoint"
            )


class Pending:
    """A step whose outcome the host does not know yet.

    Args:
        flags: whether its gradients were finite, and larger than wished, on the device.
        loss: of it.
        step: its number.
    """

    def __init__(self, flags: Tensor, loss: Tensor, step: int):
        self.loss, self.step, self.event = loss, step, None
        self.flags = flags
        if flags.is_cuda:  # a copy and an event of their own: reading a number waits for all that was launched since
            self.flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self.flags.copy_(flags, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> tuple[bool, bool]:
        """Both flags; waits for this step, not for later ones."""
        if self.event is not None:
            self.event.synchronize()
        finite, spike = self.flags.tolist()
        return finite, spike


def can_go_on(accelerator: Accelerator, task: Task) -> bool:
    """Whether steps can be taken without the host's knowing whether they were finite: on one GPU with whole weights (one
    process may have them sharded too), where nothing but the averages follows from it."""
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1 or accelerator.scaler is not None:
        return False
    if accelerator.distributed_type != DistributedType.NO:
        return False
    return not task.has_after_update


def inner_of(optimizer: Any) -> Any:
    """What Accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def leaves_out(optimizer: Any) -> bool:
    """Whether an optimizer takes ``found_inf``: fused AdamW, and Muon, whose AdamW is fused."""
    inner = inner_of(optimizer)
    return isinstance(inner, torch.optim.AdamW) and all(group.get("fused") for group in inner.param_groups)

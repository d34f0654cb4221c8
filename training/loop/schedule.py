"""How long a run is and which learning rate each step has."""

from __future__ import annotations

import math
import time

from tarflow.training.loop.config import OptimConfig

#: The speed is first measured between these steps; the first ones are slower and not counted.
TIMED_STEPS = (10, 70)
#: This share of a limit in minutes may pass before.
EARLY = 0.25


def warmup_steps(config: OptimConfig, images_per_step: int) -> int:
    """Steps of the warm-up, from ``warmup_images`` if it is given, else ``warmup_steps``."""
    return config.warmup_steps if config.warmup_images is None else -(-config.warmup_images // images_per_step)


def peak_factor(config: OptimConfig, images_per_step: int) -> float:
    """What the learning rates are multiplied by for the size of a step's batch."""
    ratio = images_per_step / config.reference_batch
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_scaling]


def schedule_factor(step: int, total: int, warmup: int, config: OptimConfig) -> float:
    """Learning rate of a step over the peak: a linear warm-up, then a cosine to ``min_lr_ratio`` at ``total`` steps, or
    a constant."""
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class TimeLimit:
    """How many steps fit into some minutes from now on, estimated again and again, as a machine's speed changes. Where steps
    are so slow that a share of the minutes, `EARLY`, is over before the speed is measured, the first few steps must do.

    The clock of one process decides, see `agree`.
    """

    def __init__(self, minutes: float):
        self.started = self.measured_from = time.perf_counter()
        self.seconds, self.measured_step, self.next_estimate, self.planned = 60 * minutes, 0, TIMED_STEPS[1], False

    def steps_left(self, done: int, most: int) -> int | None:
        """Steps for the rest of the time by this process's clock, at most ``most``, and none when it is over; None if it is
        not the time for an estimate. Called after each step with the number of steps since the start."""
        now = time.perf_counter()
        elapsed = now - self.started
        if elapsed >= self.seconds:
            return 0
        if not self.planned and done in (1, TIMED_STEPS[0]):
            self.measured_step, self.measured_from = done, now
        steps = done - self.measured_step
        early = not self.planned and elapsed > EARLY * self.seconds
        if not steps or not (early or done >= self.next_estimate):
            return None
        seconds_per_step = (now - self.measured_from) / steps
        self.measured_step, self.measured_from = done, now
        return min(most, max(1, int((self.seconds - elapsed) / seconds_per_step)))

    def agree(self, done: int, left: int) -> None:
        """Take over the number of steps that is left, which decides when to estimate again: soon, if it is from few."""
        least = TIMED_STEPS[0] if done > TIMED_STEPS[0] else 1
        self.next_estimate, self.planned = done + max(least, min(done, left) // 2), True

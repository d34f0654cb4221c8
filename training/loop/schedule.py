"""How long a run is and which learning rate each step has."""

from __future__ import annotations

import math
import time

from tarflow.training.loop.config import OptimConfig

#: The speed is first measured between these steps; the first ones are slower and not counted.
TIMED_STEPS = (10, 70)
#: This share of a limit in minutes may pass before, and after these steps that is looked at.
EARLY, LOOKS = 0.25, (1, 2, 4, TIMED_STEPS[0], 20, 40, TIMED_STEPS[1])


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

    The clock of one process decides. The others need only know at which steps it is asked, as asking holds all of them up.
    """

    def __init__(self, minutes: float):
        self.started = self.measured_from = time.perf_counter()
        self.seconds, self.measured_step, self.next_look, self.planned = 60 * minutes, 0, LOOKS[0], False

    def is_due(self, done: int) -> bool:
        """Whether it is time to look at the clock; called after each step with the number of steps since the start."""
        return done >= self.next_look

    def steps_left(self, done: int, most: int) -> int | None:
        """Steps for the rest of the time by this process's clock, at most ``most``, none when it is over; None if that
        cannot be told yet."""
        now = time.perf_counter()
        elapsed, steps = now - self.started, done - self.measured_step if self.measured_step else 0
        if elapsed >= self.seconds:
            return 0
        early = steps > 0 and elapsed > EARLY * self.seconds
        if not (self.planned or early or done >= TIMED_STEPS[1]):
            if done in (LOOKS[0], TIMED_STEPS[0]):
                self.measured_step, self.measured_from = done, now
            return None
        seconds_per_step = (now - self.measured_from) / steps
        self.measured_step, self.measured_from = done, now
        return min(most, max(1, int((self.seconds - elapsed) / seconds_per_step)))

    def agree(self, done: int, left: int | None) -> None:
        """Take over the number of steps that is left, which decides when to look again: soon, if it is from few."""
        if left is None:
            self.next_look = next(look for look in LOOKS if look > done)
            return
        least = TIMED_STEPS[0] if done > TIMED_STEPS[0] else 1
        self.next_look, self.planned = done + max(least, min(done, left) // 2), True

"""What a training trains: the part of it that the trainer does not know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from tarflow.training.loop.batches import Items
from tarflow.training.loop.config import LogSettings
from tarflow.training.loop.summary import pictures_in_words

#: A checkpoint's run.json.
State = dict[str, Any]
#: Pictures and what belongs to them, by name, as the data set's ``collate`` puts them together.
Batch = dict[str, Any]


@dataclass
class Learner:
    """A network that learns, as Accelerate has prepared it.

    Attributes:
        model: the network.
        optimizer: of its parameters. Its groups have "peak_lr", the rate that the schedule begins from, unless the rate
            is constant.
        lr: the constant learning rate; None follows the schedule.
    """

    model: nn.Module
    optimizer: AcceleratedOptimizer
    lr: float | None = None


class Task(ABC):
    """What a `Trainer` trains. The trainer calls `make_parts`, for a run that goes on `check_resume`, `prepare`,
    `prepare_reports` and, on the main process, `begin`; then for each step what `Stepper` calls, and `report`.

    Attributes:
        log: what is written while training.
        train: the training pictures; after `make_parts`.
        validation: the pictures that reports measure, None if there are none; after `make_parts`.
        learner: what is trained; after `prepare`.
    """

    log: LogSettings
    train: Items
    validation: Items | None = None
    learner: Learner

    @abstractmethod
    def make_parts(self, state: State | None) -> None:
        """Open the data, load what is needed, and make what learns.

        Args:
            state: of the checkpoint to go on from, None for a new run.

        Raises:
            ValueError: if the parts do not fit together.
        """

    @abstractmethod
    def resume_invariants(self) -> dict[str, Any]:
        """What must be the same when training goes on from a checkpoint, as JSON has it."""

    @abstractmethod
    def check_resume(self, checkpoint: Path, state: State) -> None:
        """Whether this run can go on from a checkpoint.

        Raises:
            ValueError: that names the first difference, and what to do.
        """

    @abstractmethod
    def prepare(self, fresh: bool) -> None:
        """Put what learns on its device, with its optimizer, as ``learner``.

        Args:
            fresh: whether a new run begins, whose weights are not those of a checkpoint.
        """

    def prepare_reports(self) -> None:  # noqa: B027 (most need nothing)
        """Make what reports need, after the weights are loaded; every process calls this."""

    def begin(self, fresh: bool) -> None:  # noqa: B027
        """Write or say what stands at the beginning of a run; the main process calls this."""

    def about(self) -> str:
        """What is trained on, in words."""
        return pictures_in_words(self.train, self.validation)

    def ending(self) -> str | None:
        """What stands at the end of a run: where the result is, and the line that uses it."""
        return None

    def learners(self, step: int) -> list[Learner]:
        """All networks that learn in a step, ``learner`` first."""
        return [self.learner]

    def begin_step(self, step: int) -> None:  # noqa: B027
        """Get ready for the passes of a step."""

    @abstractmethod
    def backward(self, batch: Batch, step: int, total: int, sample_ids: Sequence[int]) -> dict[str, Tensor]:
        """Gradients of one pass; returns "loss" and what else is to be logged, without gradients.

        Args:
            batch: of the training pictures.
            step: its number.
            total: steps of the run, as far as is known.
            sample_ids: numbers of the pictures in the step's batch of all processes and passes, for their random draws.
        """

    @property
    def has_after_update(self) -> bool:
        """Whether `after_update` has something to do, so that each step waits to know whether the weights have changed."""
        return False

    def after_update(self, step: int) -> None:  # noqa: B027
        """What follows the weights, after they have changed."""

    def is_report_due(self, step: int) -> bool:
        """Whether `report` is wanted after a step that is not the last."""
        return is_due(step, self.log.eval_every)

    @abstractmethod
    def report(self, step: int, average: int = 0, last: bool = False) -> dict[str, Any]:
        """Evaluate the weights as they are, those of an average, log and save what is to be; every process calls this.

        Args:
            step: steps done.
            average: the number of the average.
            last: whether training has ended.

        Returns:
            metrics, on the main process.
        """

    def state(self) -> State:
        """What a checkpoint keeps beside the trainer's own, for `check_resume` and `make_parts`."""
        return self.resume_invariants()

    def write_own(self, checkpoint: Path, process: int) -> None:  # noqa: B027
        """Write into a checkpoint what this process alone has."""

    def read_own(self, checkpoint: Path, process: int) -> None:  # noqa: B027
        """Read what `write_own` wrote; there is nothing of processes that the run did not have when it was saved.

        Raises:
            ValueError: that names the file, if it cannot be read.
        """


def is_due(step: int, every: int) -> bool:
    """Whether something that happens all so many steps, 0 for never, happens after this one."""
    return every > 0 and step % every == 0

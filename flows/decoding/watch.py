"""Whether what a calibration found still holds: real calls are watched, and the choice follows them.

A calibration may have been made while the machine was busy, and with another load another method may be the fastest.
So now and then a real call takes sequential decoding instead of what was chosen, and the faster of the two stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tarflow.flows.decoding.calibration import BlockChoice

#: After so many calls with the choice comes one that is sequential; the last distance is that of all later ones.
DISTANCES = (2, 4, 8, 16, 32)
#: A sequential block that takes less than this share of its calibrated time was calibrated on a busy machine.
QUICKER = 0.75
#: Calibrations that are made for one kind of call at most, so that an unsteady machine does not do it for ever.
MOST_CALIBRATIONS = 4
#: Where sequential decoding was calibrated to take longer than the choice by more than this factor, no call is
#: sequential unless one was slow: trials would cost more than they could gain.
CLEARLY = 2.0


@dataclass
class Calibration:
    """What is known about one kind of call.

    Attributes:
        choices: of each block, in the order of ``model.blocks``.
        batch: that they were measured with; only calls with as many are compared.
        calibrations: that were made so far.
        trials: calls that took sequential decoding to compare.
        calls: with the choice, since the last of them.
        least_ms: of each block since then.
        doubtful: whether a call took longer than sequential decoding did.
        stale: whether sequential decoding turned out so much faster that all is to be measured again.
    """

    choices: list[BlockChoice]
    batch: int
    calibrations: int = 1
    trials: int = 0
    calls: int = 0
    least_ms: list[float] = field(default_factory=list)
    doubtful: bool = False
    stale: bool = False

    @property
    def varied(self) -> bool:
        """Whether any block is inverted by something else than the one exact way."""
        return any(choice.method not in ("sequential", "parallel") for choice in self.choices)

    @property
    def settled(self) -> bool:
        """Whether real calls have confirmed it, or leave so little doubt, that no account of each is kept."""
        return self.trials >= 3 or not self.varied or (self.clear and not self.doubtful)

    @property
    def clear(self) -> bool:
        """Whether the choice is so much faster than sequential decoding that a trial now and then is not worth it."""
        sequential, best = (sum(getattr(one, name) for one in self.choices) for name in ("sequential_ms", "best_ms"))
        return sequential > CLEARLY * best

    def trial_is_due(self, doubtful_only: bool = False) -> bool:
        """Whether the next call should try sequential decoding: now and then. Where the choice is `clear`, or with
        ``doubtful_only`` (trials are dear, as steps must be compiled first), only after a slow call."""
        if self.doubtful or doubtful_only or self.clear:
            return self.varied and self.doubtful and self.calls >= DISTANCES[0]
        return self.varied and self.calls >= DISTANCES[min(self.trials, len(DISTANCES) - 1)]

    def plan(self, doubtful_only: bool = False) -> list[BlockChoice]:
        """How the next call inverts each block; see `trial_is_due`."""
        if not self.trial_is_due(doubtful_only):
            return self.choices
        return [c if c.method == "parallel" else replace(c, method="sequential", segment=None) for c in self.choices]

    def record(self, methods: Sequence[str], milliseconds: Sequence[float]) -> None:
        """Take account of a call.

        Args:
            methods: by which each block was inverted.
            milliseconds: that each took.
        """
        pairs = list(zip(self.choices, methods, milliseconds, strict=True))
        if any(method == "sequential" and choice.method != "sequential" for choice, method, _ in pairs):
            self._compare(milliseconds)
            return
        if any(method != choice.method for choice, method, _ in pairs):
            return  # the caller chose
        self.calls += 1
        self.least_ms = [min(pair) for pair in zip(self.least_ms or milliseconds, milliseconds, strict=True)]
        swept = (pair for pair in pairs if pair[1] not in ("sequential", "parallel"))
        self.doubtful |= any(time > choice.sequential_ms for choice, _, time in swept)
        sequential = (pair for pair in pairs if pair[1] == "sequential")
        self.stale = self.calibrations < MOST_CALIBRATIONS and any(
            time < QUICKER * choice.sequential_ms for choice, _, time in sequential
        )

    def _compare(self, sequential_ms: Sequence[float]) -> None:
        """After a sequential call: the faster way of each block stays."""
        found = []
        for choice, exact, other in zip(self.choices, sequential_ms, self.least_ms or sequential_ms, strict=True):
            if choice.method in ("sequential", "parallel"):
                found.append(choice)
            elif exact <= other:
                best = replace(choice, method="sequential", segment=None, sweeps=None)
                found.append(replace(best, sequential_ms=round(exact, 4), best_ms=round(exact, 4)))
            else:
                found.append(replace(choice, sequential_ms=round(exact, 4), best_ms=round(other, 4)))
        self.choices, self.trials = found, self.trials + 1
        self.calls, self.least_ms, self.doubtful = 0, [], False

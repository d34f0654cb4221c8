"""What the trainings of networks other than the flow share: one network, and metrics in a file of their own."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from tarflow.common.files import read_json_lines, write_text
from tarflow.common.progress import write_line
from tarflow.data.stream.stream import Stream
from tarflow.training.loop.agreement import main_alone
from tarflow.training.loop.checkpoint import check_invariants
from tarflow.training.loop.network_config import NetworkConfig
from tarflow.training.loop.optimizer import make_optimizer
from tarflow.training.loop.task import Learner, State, Task

#: Names of what must be the same when training goes on, which checkpoints did not keep at first.
KEPT_LATER = ("seed", "the number of training pictures", "guidance", "sample_posterior", "unguided_share")


class NetworkTask(Task):
    """A network that is trained.

    Args:
        config: of the run.
        accelerator: of the run.
        folder: of the run; it gets ``metrics.jsonl``.

    Attributes:
        network: what learns; after `make_parts`.
        betas: of AdamW.
    """

    network: nn.Module
    betas: tuple[float, float]

    def __init__(self, config: NetworkConfig, accelerator: Accelerator, folder: Path):
        self.config, self.log, self.accelerator, self.folder = config, config, accelerator, folder
        self.metrics = folder / "metrics.jsonl"

    @abstractmethod
    def network_invariants(self) -> dict[str, Any]:
        """What must be the same when training goes on, by readable names, apart from what all networks have."""

    @abstractmethod
    def measure(self, step: int, last: bool) -> dict[str, Any]:
        """Evaluate ``network`` as it is, save what is to be saved, and return metrics, numbers or lists of them. The
        main process calls this."""

    def loss_invariants(self) -> dict[str, Any]:
        """As `network_invariants`, of the loss."""
        return {}

    def resume_invariants(self) -> dict[str, Any]:
        config = self.config
        own = {
            "ema_decay": config.ema_decay,
            "pictures per step": config.batch_size * config.accumulation * self.accelerator.num_processes,
            "seed": config.seed,
        }
        if not isinstance(self.train, Stream):
            own["the number of training pictures"] = len(self.train)
        found: dict[str, Any] = json.loads(json.dumps({**self.network_invariants(), **own, **self.loss_invariants()}))
        return found

    def state(self) -> State:
        return {"facts": self.resume_invariants()}

    def check_resume(self, checkpoint: Path, state: State) -> None:
        here = self.resume_invariants()
        later = {name: here[name] for name in KEPT_LATER if name in here}  # of which older checkpoints do not tell
        check_invariants(checkpoint, {**later, **state.get("facts", {})}, here)

    def prepare(self, fresh: bool) -> None:
        config = self.config
        groups = [{"params": list(self.network.parameters()), "peak_lr": config.lr}]
        optimizer = make_optimizer(groups, config.optim, self.network, self.betas, fused=False)
        self.learner = Learner(*self.accelerator.prepare(self.network, optimizer))

    def begin(self, fresh: bool) -> None:
        if fresh:
            self.metrics.unlink(missing_ok=True)

    def report(self, step: int, average: int = 0, last: bool = False) -> dict[str, Any]:
        metrics: dict[str, Any] = {"step": step}

        def work() -> None:
            self.learner.model.eval()
            metrics.update(self.measure(step, last))
            write_metrics(self.metrics, metrics)
            numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
            self.accelerator.log({f"held_out/{name}": value for name, value in numbers.items()}, step)
            write_line(", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

        main_alone(self.accelerator, work)
        return metrics


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Add metrics, with their "step", to a file of one JSON object a line. Lines of the same or later steps, which a run
    wrote that was interrupted, are dropped."""
    before = [value for _, value in read_json_lines(path)] if path.is_file() else []
    kept = [value for value in before if value["step"] < metrics["step"]]
    write_text(path, "".join(f"{json.dumps(value)}\n" for value in [*kept, metrics]))

"""Started by a launcher in each process: runs some trainings one after the other and writes what they logged.

parallel_worker.py '{"NAME": ["--section.key", "value", …], …}' RESULT.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor

from tarflow.common.processes import gather_objects
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.trainer import flow_trainer
from tarflow.training.loop.stopping import launched_process
from tarflow.training.loop.trainer import Trainer


def train(arguments: list[str]) -> dict[str, Any]:
    """One training: all logged values in order, and its last metrics."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trainer = flow_trainer(*parse_config(arguments))
    logged: list[dict[str, float]] = []
    trainer.accelerator.log = lambda values, step: logged.append({"step": step, **values})
    trainer.accelerator.end_training = lambda: None  # the next run needs the process group
    if "killed" in trainer.folder.name and trainer.saved is None:
        killed_after(trainer, 5)
    shapes: list[list[int]] = []
    backward = trainer.task.backward

    def seen(batch: dict[str, Any], *arguments: Any) -> dict[str, torch.Tensor]:
        shapes.append(list(batch["image"].shape) if "image" in batch else [])
        return backward(batch, *arguments)

    trainer.task.backward = seen  # type: ignore[method-assign]
    if "disk_full" in trainer.folder.name and trainer.accelerator.is_main_process:
        trainer.accelerator.save_state = no_space
    try:
        metrics = trainer.run()
    except OSError as error:
        return {"error": str(error), "step": trainer.step}
    accelerator = trainer.accelerator
    parameters = list(trainer.task.learner.model.parameters())
    sharded = sum(isinstance(parameter, DTensor) for parameter in parameters) / len(parameters)
    facts = {"processes": accelerator.num_processes, "parameters": len(parameters), "sharded": sharded}
    facts["shapes"] = gather_objects(shapes)
    return {"logged": logged, **facts, **metrics}


def killed_after(trainer: Trainer, steps: int) -> None:
    """End this process, with nothing saved, when it has taken so many steps."""
    step = trainer.train_step

    def take(batches: Any) -> dict[str, torch.Tensor]:
        if trainer.step == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(batches)

    trainer.train_step = take  # type: ignore[method-assign]


def no_space(path: str) -> None:
    """Stands for `Accelerator.save_state` on one process only."""
    raise OSError(28, "No space left on device")


def main() -> None:
    torch.set_num_threads(1)
    results = {name: train(arguments) for name, arguments in json.loads(sys.argv[1]).items()}
    every: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, results)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(every))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with launched_process():
        main()

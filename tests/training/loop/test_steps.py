"""Details of optimizer steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainings import train

from tarflow.training.loop.config import LogSettings, LoopSettings, OptimConfig, StepSettings
from tarflow.training.loop.step import Stepper
from tarflow.training.loop.task import Learner
from tarflow.training.student.objective import StudentObjective
from tarflow.training.student.task import check_conditions


class Discriminated:
    """A task without weights, with a discriminator beside, which notes what is done to it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def learner(self, name: str) -> Learner:
        optimizer: Any = SimpleNamespace(
            step=lambda: self.done.append(name), zero_grad=lambda: None, step_was_skipped=False, param_groups=[]
        )
        return Learner(torch.nn.Identity(), optimizer)

    def after_update(self, step: int) -> None:
        self.done.append("after")


def updated(stepper: Stepper, *norms: float) -> list[str]:
    """What is done in a step with gradients of these norms, of the network and of a discriminator."""
    task: Any = stepper.task
    task.done.clear()
    names = ("network", "discriminator")
    learners = [task.learner(name) for name, _ in zip(names, norms, strict=False)]
    stepper.update(learners, [torch.tensor(norm) for norm in norms], torch.tensor(1.0), 0)
    return list(task.done)


def test_a_discriminators_gradient_is_no_spike_of_the_flow(tmp_path: Any) -> None:
    task: Any = Discriminated()
    accelerator: Any = SimpleNamespace(scaler=None, device=torch.device("cpu"))
    averages: Any = SimpleNamespace(step=lambda: task.done.append("average"))
    settings = LoopSettings(
        folder=tmp_path,
        resume=None,
        train=StepSettings(),
        optim=OptimConfig(skip_grad_norm=1.0, lr=0.25),
        log=LogSettings(),
        ema_decays=(0.9,),
        max_bad_steps=2,
    )
    stepper, whole = Stepper(settings, accelerator, task, averages), ["network", "discriminator", "average", "after"]
    assert updated(stepper, 0.5, 50.0) == whole and stepper.spikes == 0
    assert updated(stepper, 2.0, 0.5) == [] and stepper.spikes == 1
    assert updated(stepper, 0.5) == ["network", "average", "after"]
    assert updated(stepper, 0.5, float("nan")) == [] and stepper.bad_steps == 1  # which is not finite all the same
    assert updated(stepper, 0.5, 0.5) == whole and stepper.bad_steps == 0
    assert updated(stepper, float("inf")) == [] and stepper.spikes == 1
    with pytest.raises(ValueError, match=r"not finite in 2 steps in a row; lower optim\.lr \(0\.25\)"):
        updated(stepper, float("nan"))


def test_the_message_of_a_stopped_run_has_the_mean_loss(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def update(self: Stepper, learners: list[Learner], norms: Any, loss: torch.Tensor, step: int) -> None:
        seen.append(float(loss))
        learners[0].optimizer.zero_grad()

    monkeypatch.setattr(Stepper, "update", update)
    options = ["--train.steps", "1", "--train.accumulation", "4"]
    trainer, _ = train(tmp_path, *options)
    trainer.step = 0
    values = trainer.stepper.take(trainer.batches(), 0, 1)
    assert seen[-1] == pytest.approx(float(values["loss"]), abs=1e-6)


def test_students_learn_classes_in_the_flows_order() -> None:
    flow: Any = SimpleNamespace(config=SimpleNamespace(conditioning="class_prefix", num_classes=3))
    pipe: Any = SimpleNamespace(flow=flow, config=SimpleNamespace(id2label={"0": "cat", "1": "dog", "2": "emu"}))
    images: Any = SimpleNamespace(has_captions=False, class_names=["cat", "dog", "emu"])
    check_conditions(pipe, images)
    images.class_names = ["n01", "n02", "n03"]  # other names for them
    check_conditions(pipe, images)
    images.class_names = ["ape", "cat", "dog"]
    with pytest.raises(ValueError, match="the class 'cat' is number 0 of the model, but 1 of the data"):
        check_conditions(pipe, images)
    images.class_names = ["cat", "dog"]
    with pytest.raises(ValueError, match="the model has 3 classes, but the data has 2"):
        check_conditions(pipe, images)


def test_a_students_targets_are_computed_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = object.__new__(StudentObjective)
    made.config = SimpleNamespace(own_share=0.0, reuse=1, guidance="flow", target="clean")
    made.largest_weight, made.perceptual, made.kept = 0.0, None, None
    pictures: Any = SimpleNamespace(clean=torch.zeros(1), labels=None, cond=None, weight=None)
    asked: list[bool] = []

    def states(*_: Any) -> list[torch.Tensor]:
        asked.append(torch.is_autocast_enabled("cpu"))
        return [torch.zeros(1)]

    monkeypatch.setattr(StudentObjective, "pictures", lambda *_: pictures)
    monkeypatch.setattr(StudentObjective, "states", states)
    model: Any = lambda z, *_, **__: (z.clone().requires_grad_(), [])
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    made.accelerator = SimpleNamespace(autocast=autocast)
    made.losses(model, {}, 0, 1, range(1))
    assert asked == [False]

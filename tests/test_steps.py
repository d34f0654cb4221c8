"""Details of optimizer steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_training import train

from tarflow.training.flow.step import Stepper
from tarflow.training.student.step import StudentStepper
from tarflow.training.student.task import check_conditions


def stepper(skip_grad_norm: float | None) -> tuple[Any, list[str]]:
    """One whose weights are not there, and what it did to them."""
    done: list[str] = []
    made: Any = object.__new__(Stepper)
    made.config = SimpleNamespace(
        optim=SimpleNamespace(skip_grad_norm=skip_grad_norm, lr=1.0), train=SimpleNamespace(max_bad_steps=2)
    )
    made.accelerator = SimpleNamespace(scaler=None)
    made.optimizer = SimpleNamespace(
        step=lambda: done.append("step"), zero_grad=lambda: None, step_was_skipped=False, param_groups=[]
    )
    made.averages = SimpleNamespace(step=lambda: done.append("average"))
    made.bad_steps = made.spikes = 0
    made.others_norm = None
    return made, done


def test_a_discriminators_gradient_is_no_spike_of_the_flow() -> None:
    made, done = stepper(skip_grad_norm=1.0)
    made.others_norm = torch.tensor(50.0)
    made.update(torch.tensor(0.5), torch.tensor(1.0), [], 0)
    assert done == ["step", "average"] and made.spikes == 0
    made.update(torch.tensor(2.0), torch.tensor(1.0), [], 1)
    assert done == ["step", "average"] and made.spikes == 1
    made.others_norm = torch.tensor(float("nan"))  # which is not finite all the same
    made.update(torch.tensor(0.5), torch.tensor(1.0), [], 2)
    assert done == ["step", "average"] and made.bad_steps == 1


def test_the_message_of_a_stopped_run_has_the_mean_loss(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def update(self: Stepper, norm: Any, loss: torch.Tensor, latents: Any, step: int) -> None:
        seen.append(float(loss))
        self.optimizer.zero_grad()

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
    made: Any = object.__new__(StudentStepper)
    made.config = SimpleNamespace(own_share=0.0, guidance="flow", target="clean")
    made.largest_weight, made.perceptual = 0.0, None
    pictures: Any = SimpleNamespace(clean=torch.zeros(1), labels=None, cond=None, weight=None)
    asked: list[bool] = []

    def states(*_: Any) -> list[torch.Tensor]:
        asked.append(torch.is_autocast_enabled("cpu"))
        return [torch.zeros(1)]

    monkeypatch.setattr(StudentStepper, "pictures", lambda *_: pictures)
    monkeypatch.setattr(StudentStepper, "states", states)
    made.model = lambda z, *_, **__: (z.clone().requires_grad_(), [])
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    made.accelerator = SimpleNamespace(autocast=autocast, backward=lambda loss: loss.backward())
    made.backward({}, 0, 1, range(1))
    assert asked == [False]

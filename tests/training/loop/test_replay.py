"""Passes as CUDA graphs: the same training, through a capture that stands for a graph's; and steps that do not wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from trainings import CLASS_FLOW, TEXT_FLOW, train, weights

from tarflow.training.loop.muon import Muon
from tarflow.training.loop.replay import MOST_SHAPES, WARM_UP, Outputs, ReplayedPass, check_graphs
from tarflow.training.loop.step import can_go_on, leaves_out


class Captured:
    """Stands for a CUDA graph: what is recorded is not done, and each replay writes to the places of the first.

    Args:
        parameters: whose gradients are among these places.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters, self.captures, self.replays = parameters, 0, 0

    def __call__(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        self.captures += 1
        losses, z = work()
        gradients = [parameter.grad for parameter in self.parameters]
        for place in (*losses.values(), z, *(one for one in gradients if one is not None)):
            place.fill_(torch.nan)  # which nobody may read before a replay

        def again() -> None:
            self.replays += 1
            for parameter in self.parameters:
                parameter.grad = None
            new_losses, new_z = work()
            z.copy_(new_z)
            for name, place in losses.items():
                place.copy_(new_losses[name])
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    gradient.copy_(parameter.grad)

        return again, (losses, z)


DENOISER = CLASS_FLOW[:-1] + ', "learned_denoiser": "conditional", "denoiser_layers": 1}'


@pytest.mark.parametrize(
    ("flow", "options"),
    [
        (TEXT_FLOW, ["--text.kind", "small", "--text.width", "32", "--optim.name", "muon"]),
        (DENOISER, ["--train.noise_std", "0.3"]),
    ],
    ids=["captions, muon", "denoiser"],
)
def test_replayed_passes_train_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flow: str, options: list[str]
) -> None:
    made: list[Captured] = []

    def replayed(work: Any, parameters: list[nn.Parameter]) -> ReplayedPass:
        made.append(Captured(parameters))
        return ReplayedPass(work, parameters, made[-1])

    steps = ["--train.steps", str(WARM_UP + 5)]
    _, expected = train(tmp_path / "usual", *options, *steps, flow=flow)
    monkeypatch.setattr("tarflow.training.flow.task.check_graphs", lambda accelerator: None)
    monkeypatch.setattr("tarflow.training.flow.task.ReplayedPass", replayed)
    _, found = train(tmp_path / "replayed", *options, *steps, "--train.cuda_graphs", "true", flow=flow)
    (captured,) = made
    assert (captured.captures, captured.replays) == (1, 4)
    assert found["latent_nats_per_dim"] == pytest.approx(expected["latent_nats_per_dim"], abs=1e-5)
    ours = weights(tmp_path / "replayed")
    for name, weight in weights(tmp_path / "usual").items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)


def squares(weight: nn.Parameter) -> Callable[[dict[str, Any]], Outputs]:
    def work(inputs: dict[str, Any]) -> Outputs:
        y = inputs["x"] * weight * inputs["scale"]
        loss = y.square().sum()
        loss.backward()
        return {"loss": loss.detach()}, y.detach()

    return work


def test_other_shapes_and_numbers_are_recorded_apart() -> None:
    weight = nn.Parameter(torch.tensor(2.0))
    captured = Captured([weight])
    passes = ReplayedPass(squares(weight), [weight], captured)
    for repeat in range(WARM_UP + 3):
        for count, scale in ((2, 1.0), (2, 3.0), (5, 1.0)):
            x = torch.arange(count) + 1.0 + repeat
            weight.grad = None
            losses, z = passes({"x": x, "scale": scale})
            torch.testing.assert_close(z, 2 * scale * x)
            torch.testing.assert_close(losses["loss"], (2 * scale * x).square().sum())
            torch.testing.assert_close(weight.grad, (4 * scale**2 * x.square()).sum())
    assert (captured.captures, captured.replays) == (3, 6)
    for count in range(6, 6 + 2 * MOST_SHAPES):
        for _ in range(WARM_UP + 1):
            weight.grad = None
            passes({"x": torch.ones(count), "scale": 1.0})
    assert captured.captures == MOST_SHAPES


def test_what_cannot_be_captured_is_made_as_usual(caplog: pytest.LogCaptureFixture) -> None:
    weight, tries = nn.Parameter(torch.tensor(2.0)), []

    def failing(work: Any) -> Any:
        tries.append(work)
        weight.grad = torch.tensor(float("nan"))
        raise RuntimeError("operation not permitted when stream is capturing")

    passes = ReplayedPass(squares(weight), [weight], failing)
    for _ in range(WARM_UP + 3):
        weight.grad = None
        losses, _ = passes({"x": torch.ones(2), "scale": 1.0})
        assert float(losses["loss"]) == 8.0 and float(weight.grad) == 8.0
    assert len(tries) == 1 and "could not be captured" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"train\.cuda_graphs is for one process on a CUDA device, not 1 processes on cpu"),
        (["--train.accumulation", "2"], "takes one pass a step, not accumulation 2"),
        (["--train.mixed_precision", "fp16"], "not 'fp16'"),
        (["--train.checkpointing", "layer"], "not with checkpointing 'layer'"),
        (["--vae.train", "joint", "--train.noise_std", "0"], "not with vae.train 'joint'"),
    ],
)
def test_graphs_are_refused_where_there_are_none(tmp_path: Path, options: list[str], message: str) -> None:
    if torch.cuda.is_available() and not options:
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", "--train.steps", "1", "--train.cuda_graphs", "true", *options)


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr("tarflow.training.loop.step.can_go_on", lambda accelerator, task: True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_whose_outcome_is_known_later_train_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Also where a gradient is not finite, and where one is too large: weights, averages and counts."""
    from tarflow.training.flow.task import FlowTask

    backward = FlowTask.backward

    def disturbed(self: FlowTask, batch: Any, step: int, *rest: Any) -> Any:
        losses = backward(self, batch, step, *rest)
        for parameter in self.objective.parameters():
            if parameter.grad is not None and step in (2, 4):
                parameter.grad.mul_(float("nan") if step == 2 else 1e4)
        return losses

    monkeypatch.setattr(FlowTask, "backward", disturbed)
    options = ["--train.steps", "7", "--optim.name", optimizer, "--optim.skip_grad_norm", "1000"]
    options += ["--optim.weight_decay", "0.1", "--train.ema_decay", "0.5", "--log.checkpoint_every", "5"]
    usual, _ = train(tmp_path / "usual", *options)
    without_waiting(monkeypatch)
    ours, _ = train(tmp_path / "ours", *options)
    assert not ours.stepper.waits and usual.stepper.waits
    assert (ours.stepper.spikes, ours.averages.steps) == (usual.stepper.spikes, usual.averages.steps) == (1, 5)
    found = weights(tmp_path / "ours")
    for name, weight in weights(tmp_path / "usual").items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5)


def test_too_many_bad_steps_end_a_run_one_step_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_waiting(monkeypatch)
    monkeypatch.setattr(
        "tarflow.training.flow.objective.flow_loss", lambda z, log_det, *_: (z * float("nan")).sum() + log_det.sum()
    )
    with pytest.raises(ValueError, match=r"stopped at step 2: loss nan .* not finite in 3 steps in a row"):
        train(tmp_path, "--train.steps", "9", "--train.max_bad_steps", "3")


@pytest.mark.parametrize(
    ("change", "goes_on"),
    [
        ({}, True),
        ({"device": torch.device("cpu")}, False),
        ({"num_processes": 2, "distributed_type": DistributedType.MULTI_GPU}, False),
        ({"scaler": "of fp16"}, False),
        ({"distributed_type": DistributedType.FSDP}, False),
        ({"has_after_update": True}, False),
    ],
)
def test_steps_go_on_where_nothing_follows_from_their_outcome(change: dict[str, Any], goes_on: bool) -> None:
    """Not where one process has its weights as shares either: those cannot be mixed with a number on the device."""
    usual = {"device": torch.device("cuda"), "num_processes": 1, "scaler": None, "has_after_update": False}
    given = SimpleNamespace(**{**usual, "distributed_type": DistributedType.NO, **change})
    assert can_go_on(given, given) == goes_on
    if given.distributed_type == DistributedType.FSDP:
        with pytest.raises(ValueError, match=r"train\.cuda_graphs is for weights that are whole, not sharded"):
            check_graphs(given)


def test_only_what_leaves_out_steps_itself_goes_on() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    assert leaves_out(torch.optim.AdamW([weight], fused=True))
    assert leaves_out(Muon([{"params": [weight], "muon": True}]))
    assert not leaves_out(torch.optim.AdamW([weight])) and not leaves_out(torch.optim.SGD([weight]))

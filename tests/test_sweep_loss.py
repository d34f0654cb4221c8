"""The loss of sweeps: what it is, its gradient, and what training with it makes of a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import condition_of, random_images, small_model
from test_sampling import MODELS
from test_training import train, weights
from torch import Tensor

from tarflow.flows.blocks.autoregressive import FlowBlock
from tarflow.flows.likelihood import flow_loss
from tarflow.flows.model import TARFlowModel
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.objective import FlowObjective
from tarflow.training.flow.sweep_config import SweepLossConfig
from tarflow.training.flow.sweep_loss import SweepTerm, error_left, sweep_term

SWEEPS = ["--train.sweep_loss.weight", "0.1", "--train.sweep_loss.sweeps", "3"]


def deep_block(model: TARFlowModel, batch: int = 3) -> tuple[FlowBlock, Tensor, Tensor, tuple[int, int], Any]:
    """The last block, tokens, what it makes of them, their grid and a condition."""
    torch.manual_seed(0)
    x, grid = model.patchify(random_images(model, batch))
    condition = model.condition(**condition_of(model, batch), **missing(model), batch=batch)
    block = model.blocks[-1]
    assert isinstance(block, FlowBlock)
    return block, x, block(x, grid, condition)[0], grid, condition


def missing(model: TARFlowModel) -> dict[str, None]:
    return {name: None for name in ("class_labels", "cond") if name not in condition_of(model, 1)}


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_the_only_fixed_point_of_sweeps(name: str) -> None:
    model = small_model(**{**MODELS[name], "sample_size": 8}).double()
    block, x, z, grid, condition = deep_block(model)
    with torch.no_grad():
        torch.testing.assert_close(block.sweep(x, z, grid, condition), x, rtol=1e-9, atol=1e-9)
        swept = torch.randn_like(x)
        for _ in range(x.shape[1]):
            swept = block.sweep(swept, z, grid, condition)
    torch.testing.assert_close(swept, x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("counted", [1, 2])
def test_gradients_are_of_the_last_sweeps_alone(counted: int) -> None:
    model = small_model(conditioning="prefix", sample_size=8).double()
    block, x, z, grid, condition = deep_block(model)
    x, z = x.detach(), z.detach()
    term = SweepTerm(1.0, "deep", 1, counted)
    loss = error_left(block, x, z, grid, condition, term)
    parameters = list(block.parameters())
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    direction = [torch.randn_like(one) for one in parameters]
    slope = sum((a * b).sum() for a, b in zip(gradient, direction, strict=True) if a is not None)
    with torch.no_grad():
        begin = block.sweep(z, z, grid, condition)
        before = (begin - x).pow(2).mean((1, 2))

        def value(step: float) -> Tensor:
            for one, along in zip(parameters, direction, strict=True):
                one.add_(step * along)
            swept = begin
            for _ in range(counted):
                swept = block.sweep(swept, z, grid, condition)
            for one, along in zip(parameters, direction, strict=True):
                one.sub_(step * along)
            return ((swept - x).pow(2).mean((1, 2)) / before).mean()

        torch.testing.assert_close(value(0.0), loss)
        torch.testing.assert_close(slope, (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("blocks", ["deep", "all"])
def test_the_objective_adds_it(blocks: str) -> None:
    model = small_model(sample_size=8).double()
    latents, term = random_images(model, 2), SweepTerm(0.5, blocks, 1, 1)
    output = FlowObjective(model)(latents, sweeps=term)
    z, log_det, outputs = model(latents, return_block_outputs=True)
    states, grid = [model.patchify(one)[0] for one in (latents, *outputs)], model.patchify(latents)[1]
    shares = [
        error_left(block, x, y, grid, None, term) for block, x, y in zip(model.blocks, states, states[1:], strict=False)
    ]
    expected = shares[-1] if blocks == "deep" else sum(shares) / len(shares)
    torch.testing.assert_close(output["sweep_loss"], expected.detach())
    torch.testing.assert_close(output["loss"], flow_loss(z, log_det) + 0.5 * expected)
    output["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "sweep_loss" not in FlowObjective(model)(latents)


def test_a_steps_sweeps_are_drawn_once_for_all_passes_and_processes() -> None:
    config = SweepLossConfig(weight=0.1, sweeps=4, gradient_sweeps=2)
    terms = [sweep_term(config, 0, step) for step in range(60)]
    assert terms == [sweep_term(config, 0, step) for step in range(60)]
    assert {(one.sweeps, one.gradient_sweeps) for one in terms if one} == {(0, 1), (0, 2), (1, 2), (2, 2)}
    assert sweep_term(SweepLossConfig(), 0, 1) is None


def test_a_block_learns_to_converge_in_fewer_sweeps() -> None:
    """Tokens that follow each other closely: what sweeps leave of the distance becomes less, and likelihood still rises."""
    torch.manual_seed(0)
    steps = torch.randn(128, 2, 4, 4)
    data = steps.flatten(2).cumsum(2).view_as(steps) / 4
    left, nats = [], []
    for weight in (0.0, 0.3):
        torch.manual_seed(1)
        model = TARFlowModel(in_channels=2, sample_size=4, layers_per_block=(1, 1), width=32, head_dim=16)
        objective, term = FlowObjective(model), SweepTerm(weight, "deep", 1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for step in range(40):
            rows = data[32 * (step % 4) : 32 * (step % 4) + 32]
            optimizer.zero_grad()
            objective(rows + 0.1 * torch.randn_like(rows), sweeps=term if weight else None)["loss"].backward()
            optimizer.step()
        with torch.no_grad():
            found = objective(data, sweeps=SweepTerm(1.0, "deep", 1, 1))
        left.append(float(found["sweep_loss"]))
        nats.append(float(found["nats_per_dim"].mean()))
    assert left[1] < 0.7 * left[0]
    assert nats[0] < nats[1] < 0.8  # of 0.98 at the start


def test_training_with_it_goes_on_as_if_never_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: logged.append(values))
    options = [*SWEEPS, "--train.sweep_loss.blocks", "all", "--log.log_every", "1", "--train.steps", "4"]
    train(tmp_path / "whole", *options)
    assert sum("train/sweep_loss" in values for values in logged) == 4
    train(tmp_path / "parts", *options, "--log.checkpoint_every", "3")
    train(tmp_path / "again", *options, "--resume", str(tmp_path / "parts" / "checkpoints" / "step_00000003"))
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    tuned, _ = train(tmp_path / "tuned", *options, "--init_from", str(tmp_path / "whole" / "pipeline"))
    assert tuned.step == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            '{"block": "coupling"}',
            r"train\.sweep_loss is for autoregressive blocks.*flow\.block 'coupling' are drawn in",
        ),
        ('{"block": "inverse_autoregressive"}', r"flow\.block 'inverse_autoregressive' are drawn in one pass: leave"),
        ('{"learned_denoiser": "unconditional"}', r"set train\.sweep_loss\.weight to 0"),
        ('{"kind": "trajectory"}', r"train\.sweep_loss is for flow\.kind 'flow', not 'trajectory'"),
        ("--train.cuda_graphs=true", r"train\.cuda_graphs cannot launch as one graph"),
        ("--train.sweep_loss.sweeps=0", r"train\.sweep_loss\.sweeps must be at least 1, got 0"),
        ("--train.sweep_loss.weight=-1", r"train\.sweep_loss\.weight must be 0 or positive, got -1"),
        (
            "--train.sweep_loss.gradient_sweeps=4",
            r"gradient_sweeps \(4\) are the last of train\.sweep_loss\.sweeps \(3\)",
        ),
        ("--train.sweep_loss.blocks=first", r"train\.sweep_loss\.blocks|first"),
    ],
)
def test_what_it_does_not_fit_is_refused(options: str, sentence: str, tmp_path: Path) -> None:
    given = ["--flow", options] if options.startswith("{") else options.split("=")
    with pytest.raises((ValueError, SystemExit), match=sentence):
        parse_config(["--data", "{}", "--output", str(tmp_path), *SWEEPS, *given])

"""Training trajectory models with the trainer of flows."""

from __future__ import annotations

import json

import pytest
import torch
from trainings import SMALL, train, weights

from tarflow import TARFlowPipeline
from tarflow.flows.trajectory.chain import chain_entropy
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.trajectory import trajectory_metrics

FLOW = (
    '{"kind": "trajectory", "layers_per_block": [1, 1], "width": 64, "head_dim": 32, "conditioning": "prefix", '
    '"steps": [2, 4]}'
)
LEVELS = FLOW.replace("}", ', "transporter_levels": true}')
TEXT = ["--text.kind", "small", "--text.width", "16", "--text.layers", "1", "--text.vocab_captions", "200"]


def test_the_loss_falls_and_the_pipeline_draws(tmp_path):
    shown = ["--log.sample_every", "1", "--log.sample_images", "1"]
    _, early = train(tmp_path / "a", *TEXT, *shown, "--train.steps", "1", flow=LEVELS)
    _, late = train(tmp_path / "b", *TEXT, "--train.steps", "15", flow=LEVELS)
    for steps in (2, 4):
        assert late[f"trajectory_nats_per_dim_{steps}"] < early[f"trajectory_nats_per_dim_{steps}"]
        name = f"latent_nats_per_dim_bound_{steps}"
        assert late[name] < early[name] - 0.01
    assert (tmp_path / "a" / "samples" / "samples_00000001_raw.png").is_file()
    held_out = json.loads((tmp_path / "b" / "pipeline" / "held_out.json").read_text())
    assert held_out["trajectory_nats_per_dim_4"] == pytest.approx(late["trajectory_nats_per_dim_4"])
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "b" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red ring", num_inference_steps=4, decoding="sequential").images[0].size == (32, 32)


@pytest.mark.parametrize("mode", ["pair", "all"])
def test_resume_is_bit_identical(tmp_path, mode):
    options = [*TEXT, "--train.steps", "2", "--train.trajectory", mode, "--optim.name", "muon"]
    train(tmp_path / "whole", *options, "--log.checkpoint_every", "1", flow=FLOW)
    resume = str(tmp_path / "whole" / "checkpoints" / "step_00000001")
    train(tmp_path / "again", *options, "--resume", resume, flow=FLOW)
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    if mode == "pair":
        other = FLOW.replace('"kind": "trajectory", ', "").replace(', "steps": [2, 4]', "")
        with pytest.raises(ValueError, match=r"is of flow\.kind 'trajectory', not 'flow'"):
            train(tmp_path / "again", *TEXT, "--train.steps", "2", "--resume", resume, flow=other)


def test_a_bound_of_white_noise_is_its_entropy():
    """The exact likelihood of a chain of white data gives the exact number of the data with its noise."""
    from tarflow import TrajectoryFlowModel

    model = TrajectoryFlowModel(steps=(3,), width=64)
    levels = model.levels(3, 0.3)
    entropy = 0.5 * torch.log(torch.tensor(2 * torch.pi * torch.e * (1 + 0.3**2))).item()
    last = entropy + torch.log(torch.tensor(1 - levels[-1])).item()  # of (1 − t)·(x₀ + σ·ε)
    chain, bound = trajectory_metrics((last + chain_entropy(levels)) / 4, levels, 0.3)
    assert chain == pytest.approx((last + chain_entropy(levels)) / 4)
    assert bound == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize(
    ("flow", "options", "told"),
    [
        (FLOW.replace("trajectory", "spline"), [], "flow.kind must be one of flow, trajectory, got 'spline'"),
        (FLOW, ["--train.noise", "uniform", "--vae.name", "none"], "needs gaussian noise"),
        (FLOW, ["--train.latent_norm_weight", "0.1"], "latent_norm_weight is for flow.kind 'flow'"),
        (LEVELS, ["--train.noise_std", "0"], "transporter_levels needs train.noise_std above 0"),
        (FLOW, ["--lora.rank", "2", "--init_from", "x"], "has no adapters"),
        (FLOW.replace('"width": 64', '"block": "coupling"'), [], "unknown key flow.block"),
        ('{"width": 64, "steps": [4]}', [], "unknown key flow.steps"),
        ('{"width": 64}', ["--train.trajectory", "all"], "train.trajectory 'all' is for flow.kind 'trajectory'"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, flow, options, told):
    with pytest.raises(ValueError, match=told):
        parse_config(["--data", "{}", "--flow", flow, *SMALL, "--output", str(tmp_path), *options])

"""Settings of Accelerate's launcher, configuration file and environment: obeyed, or refused in a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import DynamoBackend
from helpers import fresh_process
from trainings import CLASS_FLOW, SMALL, train

from tarflow.training.flow.accelerator import flow_accelerator
from tarflow.training.flow.arguments import parse_config
from tarflow.training.loop.accelerator import make_accelerator
from tarflow.training.loop.checkpoint import checkpoints
from tarflow.training.loop.launcher import check_launcher, launcher_compilation
from tarflow.training.loop.network_config import NetworkConfig

ARGUMENTS = ["--data", "{}", "--flow", CLASS_FLOW, *SMALL]
REFUSED = [
    (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        r"4 gradient accumulation steps, but (train\.)?accumulation is 1",
    ),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, r"mixed precision 'fp16', but (train\.)?mixed_precision is 'no'"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed precision 'fp8'"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "the launcher wants DeepSpeed, which is not supported: start with"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism configuration"),
    ({"ACCELERATE_USE_TP": "true"}, "tensor parallelism"),
]
FSDP = [
    ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not supported"),
    ({"FSDP_IGNORED_MODULES": "blocks.0.*"}, r"fsdp_ignored_modules is 'blocks\.0\.\*'"),
    ({"FSDP_VERSION": "1"}, "FSDP must be version 2"),
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "FSDP_")) and name != "ACCELERATE_USE_CPU":
            monkeypatch.delenv(name)
    fresh_process()


def set_all(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def test_half_precision_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate leaves it out there without a word."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config, _ = parse_config([*ARGUMENTS, "--output", str(tmp_path / "run"), "--train.mixed_precision", "fp16"])
    with pytest.raises(ValueError, match=r"^train\.mixed_precision fp16 is for GPUs.* take bf16 or no"):
        flow_accelerator(config)
    with pytest.raises(ValueError, match=r"^mixed_precision fp16 is for GPUs"):
        make_accelerator(NetworkConfig(mixed_precision="fp16", trackers=[]).loop(tmp_path))


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_no_training_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    config, _ = parse_config([*ARGUMENTS, "--output", str(tmp_path / "run")])
    set_all(monkeypatch, settings)
    with pytest.raises(ValueError, match=message):
        flow_accelerator(config)
    with pytest.raises(ValueError, match=message):
        make_accelerator(NetworkConfig(mixed_precision="no", trackers=[]).loop(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("settings", "message"), FSDP)
def test_ways_to_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str) -> None:
    config, _ = parse_config([*ARGUMENTS, "--output", str(tmp_path)])
    set_all(monkeypatch, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **settings})
    with pytest.raises(ValueError, match=message):
        flow_accelerator(config)


def test_networks_are_not_sharded_or_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = NetworkConfig(mixed_precision="no", trackers=[])
    set_all(monkeypatch, {"ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(ValueError, match="this network is not sharded"):
        make_accelerator(config.loop(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="dynamo_backend 'inductor', but this network is not compiled"):
        make_accelerator(config.loop(tmp_path))


def test_what_says_the_same_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_MIXED_PRECISION": "no"}
    set_all(monkeypatch, {**same, "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_DEEPSPEED": "false"})
    check_launcher("bf16", 2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # not asked for: the run's own counts
    trainer, _ = train(tmp_path, "--train.steps", "3", "--train.accumulation", "2", "--log.checkpoint_every", "3")
    assert trainer.accelerator.gradient_accumulation_steps == 2
    assert read(tmp_path)["ema_steps"] == 3


def test_the_launchers_compiler_compiles_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher_compilation() is None
    set_all(monkeypatch, {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"})
    assert launcher_compilation()["backend"] == "eager"
    asked: list[dict[str, Any]] = []
    compile_layers = "tarflow.flows.model.TARFlowModel.compile_repeated_blocks"
    monkeypatch.setattr(compile_layers, lambda self, **arguments: asked.append(arguments))
    trainer, _ = train(tmp_path, "--train.steps", "1")
    assert [arguments["backend"] for arguments in asked] == ["eager"]
    assert trainer.accelerator.state.dynamo_plugin.backend is DynamoBackend.NO
    assert (tmp_path / "pipeline").is_dir()


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        ('{"layers_per_block": 2}', r"^flow\.layers_per_block must be a list, such as '\[1, 2\]', got '2'$"),
        ('{"layers_per_block": "1,1"}', r"^flow\.layers_per_block must be a list, such as '\[1, 2\]', got '1,1'$"),
        ('{"width": "abc"}', "^flow.width must be a whole number, got 'abc'$"),
        ('{"bias": "maybe"}', "^flow.bias must be true or false, got 'maybe'$"),
        ('{"num_heads": "x"}', "^flow.num_heads must be a whole number or null, got 'x'$"),
        ('{"head_dim": 0}', "head_dim must be at least 1, got 0"),
        ('{"num_heads": 0}', "num_heads must be at least 1, got 0"),
        ('{"soft_clip": "much"}', "^flow.soft_clip must be a number, got 'much'$"),
    ],
)
def test_flow_settings_of_wrong_types(tmp_path: Path, flow: str, message: str) -> None:
    whole = {**json.loads(CLASS_FLOW), **json.loads(flow)}
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", flow=json.dumps(whole))
    assert list(tmp_path.iterdir()) == []


def read(folder: Path) -> dict[str, Any]:
    return json.loads((checkpoints(folder / "checkpoints")[-1] / "run.json").read_text())


def rewrite(folder: Path, **changes: Any) -> None:
    """Change, or with None take away, what the last checkpoint knows."""
    state = {**read(folder), **changes}
    path = checkpoints(folder / "checkpoints")[-1] / "run.json"
    path.write_text(json.dumps({key: value for key, value in state.items() if key not in changes or value is not None}))


def test_runs_are_not_mixed(tmp_path: Path) -> None:
    options = ["--train.steps", "2", "--log.checkpoint_every", "1"]
    train(tmp_path / "a", *options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"has checkpoints of an earlier run, up to step_00000002: go on with --resume"
    ):
        train(tmp_path / "a", *options)
    train(tmp_path / "b", *options)
    other = str(tmp_path / "b" / "checkpoints" / "step_00000001")
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        train(tmp_path / "a", *options, "--resume", other)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in (tmp_path / "a").rglob("*") if path.is_file()} == set(before)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    train(tmp_path / "c", *options, "--resume", "auto")  # other files do not count
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"
    trainer, _ = train(tmp_path / "c", *options, "--resume", "auto")
    assert trainer.step == 2


def test_checkpoints_know_classes(tmp_path: Path) -> None:
    options = ["--train.steps", "1", "--log.checkpoint_every", "1"]
    train(tmp_path, *options)
    names = read(tmp_path)["classes"]
    assert names[:2] == ["red circle", "green circle"] and read(tmp_path)["tokens"] is None
    resume = [*options, "--train.steps", "2", "--resume", "latest"]
    rewrite(tmp_path, classes=["zebra", *names[1:]])
    with pytest.raises(ValueError, match=r"other classes: class 0 is 'zebra' there and 'red circle' here; resume with"):
        train(tmp_path, *resume)
    rewrite(tmp_path, classes=names[:-1])
    with pytest.raises(ValueError, match=f"class {len(names) - 1} is none there and {names[-1]!r} here"):
        train(tmp_path, *resume)
    rewrite(tmp_path, classes=None)  # of a version that did not keep them
    trainer, _ = train(tmp_path, *resume)
    assert trainer.step == 2


def test_checkpoints_know_tokens(tmp_path: Path) -> None:
    flow = CLASS_FLOW.replace("class_prefix", "prefix")
    text = ["--text.kind", "small", "--text.width", "16", "--text.layers", "1", "--text.heads", "2"]
    options = [*text, "--train.steps", "1", "--log.checkpoint_every", "1"]
    train(tmp_path, *options, flow=flow)
    tokens = read(tmp_path)["tokens"]
    assert tokens[:3] == ["<pad>", "</s>", "<unk>"]
    swapped = [*tokens[:3], tokens[4], tokens[3], *tokens[5:]]
    rewrite(tmp_path, tokens=swapped)
    with pytest.raises(ValueError, match=f"other tokens: token 3 is {tokens[4]!r} there and {tokens[3]!r} here"):
        train(tmp_path, *options, "--train.steps", "2", "--resume", "latest", flow=flow)
    rewrite(tmp_path, tokens="a hash")
    with pytest.raises(ValueError, match="was trained with other tokens than this run has"):
        train(tmp_path, *options, "--train.steps", "2", "--resume", "latest", flow=flow)
    rewrite(tmp_path, tokens=tokens)
    trainer, _ = train(tmp_path, *options, "--train.steps", "2", "--resume", "latest", flow=flow)
    assert trainer.step == 2

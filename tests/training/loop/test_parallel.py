"""Two processes on the CPU, whole models (DDP) and divided ones (FSDP2), started with the files of configs/accelerate."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_runs import by_run, forked, launched
from safetensors.torch import load_file
from stream_helpers import parquet_shards, row, tar_bytes, write
from text_models import make_encoder, make_tokenizer, saved
from torch import Tensor
from trainings import CLASS_FLOW, TEXT_FLOW, train
from transformers import T5EncoderModel

from tarflow import TARFlowPipeline
from tarflow.training.flow.config import TextConfig
from tarflow.training.flow.text import small_t5, train_tokenizer

pytestmark = pytest.mark.skipif(
    os.environ.get("TARFLOW_TEST_DEVICE", "cpu") != "cpu", reason="compares processes on the CPU with one there"
)
ARGUMENTS = [
    *("--data.image_size", "32", "--vae.measure_images", "16", "--flow", TEXT_FLOW),
    *("--text.max_length", "12", "--train.mixed_precision", "no", "--optim.warmup_steps", "2"),
    *("--train.ema_decay", "0.9", "--train.more_ema_decays", "[0.5]"),
    *("--log.trackers", "[]", "--log.log_every", "1", "--log.eval_every", "3", "--log.eval_images", "10"),
    *("--log.sample_every", "0", "--log.sample_images", "2", "--log.checkpoint_every", "4"),
]
#: An autoencoder that is trained along, of 16 pixels to latents of 8 × 8, for three steps.
JOINT = [
    *("--vae.train", "joint", "--train.noise_std", "0", "--data.image_size", "16", "--vae.name", "new"),
    *("--joint.model.latent_channels", "2", "--joint.model.block_out_channels", "[8, 16]"),
    *("--joint.model.down_block_types", '["DownEncoderBlock2D", "DownEncoderBlock2D"]'),
    *("--joint.model.up_block_types", '["UpDecoderBlock2D", "UpDecoderBlock2D"]'),
    *("--joint.model.norm_num_groups", "4", "--train.steps", "3", "--train.more_ema_decays", "[]"),
    *("--log.checkpoint_every", "0"),
]
#: One flow for many noise levels.
LEVELS = [
    *("--train.noise_levels.low", "0.02", "--train.noise_levels.high", "0.5"),
    *("--train.steps", "4", "--train.more_ema_decays", "[]", "--log.checkpoint_every", "2"),
]
SMALL_TEXT = ["--text.kind", "small", "--text.width", "16", "--text.layers", "1", "--text.vocab_captions", "500"]


def launch(kind: str, processes: int, runs: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    """Results of `parallel_worker` by run, started as a user starts it."""
    result = folder / "result.json"
    launched(kind, processes, "tests/parallel_worker.py", [json.dumps(runs), str(result)])
    return by_run(json.loads(result.read_text()))


def all_weights(pipeline: Path) -> dict[str, Tensor]:
    files = sorted(pipeline.glob("*/*.safetensors"))
    assert {file.parent.name for file in files} == {"flow", "text_encoder", "vae"}
    return {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}


def losses(result: dict[str, Any]) -> dict[int, float]:
    return {values["step"]: values["train/loss"] for values in result["logged"] if "train/loss" in values}


def held_out(result: dict[str, Any]) -> dict[tuple[int, str], float]:
    names = ("held_out/latent_nats_per_dim", "held_out_ema_0.5/latent_nats_per_dim")
    return {(values["step"], name): values[name] for values in result["logged"] for name in names if name in values}


def reconstructions(result: dict[str, Any]) -> list[float]:
    return [values[name] for values in result["logged"] for name in values if name.endswith(("psnr", "means_std"))]


def run_logged(folder: Path, *arguments: str, flow: str = TEXT_FLOW) -> dict[str, Any]:
    """What a training in this process logs."""
    logged: list[dict[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.Accelerator.log", lambda self, values, step: logged.append({"step": step, **values}))
        train(folder, *arguments, flow=flow)
    return {"logged": logged}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run that all others must equal: batches of eight in one process, two passes a step."""
    folder = tmp_path_factory.mktemp("one")
    arguments = [*ARGUMENTS, *SMALL_TEXT, "--train.batch_size", "4", "--train.accumulation", "2"]
    return folder / "run", run_logged(folder / "run", *arguments, "--train.steps", "6")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(tmp_path: Path, one_process: tuple[Path, dict[str, Any]], kind: str) -> None:
    arguments = [*ARGUMENTS, *SMALL_TEXT, "--train.batch_size", "4", "--train.steps", "6"]
    runs = {"whole": [*arguments, "--output", str(tmp_path / "whole"), "--log.sample_every", "3"]}
    muon = [*arguments, "--optim.name", "muon", "--train.steps", "3", "--log.checkpoint_every", "2"]
    runs["muon"] = [*muon, "--output", str(tmp_path / "muon")]
    levels = [*arguments, *LEVELS]
    runs["levels"] = [*levels, "--output", str(tmp_path / "levels")]
    step = str(tmp_path / "levels" / "checkpoints" / "step_00000002")
    runs["levels_again"] = [*levels, "--resume", step, "--output", str(tmp_path / "levels_again")]
    if kind == "ddp":  # a checkpoint of one process goes on with two
        resume = ["--resume", str(one_process[0] / "checkpoints" / "step_00000004")]
        runs["resumed"] = [*arguments, "--output", str(tmp_path / "resumed"), *resume]
        runs["joint"] = [*arguments, *JOINT, "--output", str(tmp_path / "joint")]
        runs["full"] = [*arguments, "--output", str(tmp_path / "disk_full")]
    # One of the files is tried with the launcher's own processes; test_autoencoder.py does so with the other one.
    results = (launch if kind == "fsdp2" else forked)(kind, 2, runs, tmp_path)
    assert results["whole"]["processes"] == 2
    assert results["whole"]["sharded"] == (1.0 if kind == "fsdp2" else 0.0)
    expected = losses(one_process[1])
    assert len(expected) == 6
    assert losses(results["whole"]) == pytest.approx(expected, abs=1e-5)
    assert held_out(results["whole"]) == pytest.approx(held_out(one_process[1]), abs=1e-5)
    assert sorted(path.name for path in (tmp_path / "whole" / "samples").iterdir()) == [
        f"samples_0000000{step}{suffix}.png" for step in (3, 6) for suffix in ("", "_raw")
    ]

    logged = run_logged(tmp_path / "muon_one", *muon, "--train.accumulation", "2")
    assert losses(results["muon"]) == pytest.approx(losses(logged), abs=1e-4)

    check_levels(results, run_logged(tmp_path / "levels_one", *levels, "--train.accumulation", "2"), tmp_path)

    if kind == "ddp":  # an autoencoder that is trained along
        logged = run_logged(tmp_path / "joint_one", *arguments, *JOINT, "--train.accumulation", "2")
        assert losses(results["joint"]) == pytest.approx(losses(logged), abs=1e-5)
        assert reconstructions(results["joint"]) == pytest.approx(reconstructions(logged), rel=1e-3)

    resume = ["--resume", str(tmp_path / "whole" / "checkpoints" / "step_00000004")]
    if kind == "ddp":  # one process cannot write a checkpoint: all stop, and nothing stays half-written
        assert "No space left on device" in results["full"]["error"]
        assert "another process failed" in results["full"]["others"][0]["error"]
        assert list((tmp_path / "disk_full" / "checkpoints").iterdir()) == []
    if kind == "ddp":  # and one of two processes with one
        resumed = held_out(results["resumed"])
        more, _ = train(tmp_path / "more", *arguments[:-4], "--train.batch_size", "8", "--train.steps", "6", *resume)
        assert more.step == 6
        folders = ["resumed", "more"]
    else:
        runs = {"resumed": [*arguments, "--output", str(tmp_path / "resumed"), "--train.batch_size", "8", *resume]}
        resume = ["--resume", str(tmp_path / "muon" / "checkpoints" / "step_00000002")]
        runs["muon"] = [*muon, "--output", str(tmp_path / "muon_resumed"), "--train.batch_size", "8", *resume]
        results = forked(kind, 1, runs, tmp_path)
        result = results["resumed"]
        assert losses(results["muon"])[3] == pytest.approx(losses(logged)[3], abs=1e-4)
        assert result["processes"] == 1
        assert losses(result) == pytest.approx({step: expected[step] for step in (5, 6)}, abs=1e-5)
        resumed, folders = held_out(result), ["resumed"]
    assert resumed == pytest.approx(
        {key: value for key, value in held_out(one_process[1]).items() if key[0] > 4}, abs=1e-5
    )

    # The exported pipelines, the second average's too, are those of one process.
    for name in ("pipeline", "pipeline_ema_0.5"):
        expected_weights = all_weights(one_process[0] / name)
        for folder in ("whole", *folders):
            weights = all_weights(tmp_path / folder / name)
            assert weights.keys() == expected_weights.keys()
            for key, value in weights.items():
                torch.testing.assert_close(
                    value, expected_weights[key], rtol=0, atol=1e-4, msg=f"{folder}/{name} {key}"
                )


def check_levels(results: dict[str, Any], logged: dict[str, Any], folder: Path) -> None:
    """Noise levels of pictures do not depend on the processes, and a run of two that goes on has the same bits."""
    assert losses(results["levels"]) == pytest.approx(losses(logged), abs=1e-5)
    assert levels_held_out(results["levels"]) == pytest.approx(levels_held_out(logged), abs=1e-5)
    assert {name.rsplit("_", 1)[1] for name in levels_held_out(logged)} == {"0.02", "0.1", "0.5"}
    whole, again = losses(results["levels"]), losses(results["levels_again"])
    assert again == {step: whole[step] for step in (3, 4)}
    first, second = (all_weights(folder / name / "pipeline") for name in ("levels", "levels_again"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def levels_held_out(result: dict[str, Any]) -> dict[str, float]:
    """The last held-out likelihoods at each level."""
    return {name: one for values in result["logged"] for name, one in values.items() if "nats_per_dim_at_" in name}


def test_two_processes_that_stream_are_killed_and_go_on(tmp_path: Path) -> None:
    tar = f"{(tmp_path / 'tar').as_uri()}/{{0..3}}.tar"
    for shard in range(4):  # a third of the pictures is wide
        rows = [row(number, (64, 32) if number % 3 == 0 else (32, 32)) for number in range(18 * shard, 18 * shard + 18)]
        write(tar.replace("{0..3}", str(shard)), tar_bytes(rows, 18 * shard))
    parquet = parquet_shards((tmp_path / "parquet").as_uri(), [20, 13, 30, 11])
    mix = {
        "tar": {"path": tar, "label_column": "cls"},
        "parquet": {
            "source": "datasets",
            "name": "parquet",
            "data_files": parquet,
            "label_column": "label",
            "weight": 2,
        },
    }
    common = [*ARGUMENTS, "--flow", CLASS_FLOW, "--data.class_names", '["even", "odd"]', "--data.shuffle_buffer", "16"]
    common += ["--data.validation_fraction", "0.2", "--train.num_workers", "2", "--data.source", "webdataset"]
    mixed = [*common, "--data.mix", json.dumps(mix), "--train.steps", "7", "--train.batch_size"]
    sizes = [*common, "--data.path", tar, "--data.label_column", "cls", "--data.aspect_ratios", '["1:1", "2:1"]']
    sizes += ["--train.steps", "6", "--train.batch_size", "4", "--output"]
    killed, step = str(tmp_path / "killed"), str(tmp_path / "sizes" / "checkpoints" / "step_00000004")
    forked("ddp", 2, {"killed": [*mixed, "4", "--output", killed]}, tmp_path, killed=True)
    copied = shutil.copytree(killed, tmp_path / "other")
    runs = {
        "whole": [*mixed, "4", "--output", str(tmp_path / "whole")],
        "again": [*mixed, "4", "--output", killed, "--resume", "latest"],
        "sizes": [*sizes, str(tmp_path / "sizes")],
        "sizes_again": [*sizes, str(tmp_path / "sizes_again"), "--resume", step],
    }
    results = forked("ddp", 2, runs, tmp_path)
    expected = losses(results["whole"])
    assert len(expected) == 7
    assert losses(results["again"]) == {step: expected[step] for step in (5, 6, 7)}  # to the bit
    assert held_out(results["again"]).items() <= held_out(results["whole"]).items()
    assert losses(results["sizes_again"]) == {step: losses(results["sizes"])[step] for step in (5, 6)}
    first, second = results["sizes"]["shapes"]  # of the batches of both processes
    assert first == second
    assert {tuple(shape[2:]) for shape in first} == {(32, 32), (24, 48)}
    # One process goes on with the same pictures at the same places.
    logged = run_logged(copied, *mixed, "8", "--resume", "latest", flow=CLASS_FLOW)
    assert losses(logged) == pytest.approx({step: expected[step] for step in (5, 6, 7)}, abs=1e-5)


def test_a_frozen_text_encoder_can_be_sharded(tmp_path: Path) -> None:
    config = TextConfig(kind="small", width=16, layers=2, max_length=12)
    tokenizer = train_tokenizer(["a small red circle on a dark background"], config)
    T5EncoderModel(small_t5(config, len(tokenizer))).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    text = ["--text.kind", "pretrained", "--text.name", str(tmp_path / "t5"), "--train.batch_size", "4"]
    arguments = [*ARGUMENTS, *text, "--train.steps", "3", "--log.checkpoint_every", "0"]
    runs = {
        name: [*arguments, "--output", str(tmp_path / name), "--text.shard", shard]
        for name, shard in (("sharded", "true"), ("whole", "false"))
    }
    runs["bf16"] = [*runs["sharded"], "--output", str(tmp_path / "bf16"), "--train.mixed_precision", "bf16"]
    name = saved(tmp_path / "qwen", make_encoder("Qwen3Model", attention_dropout=0.5), make_tokenizer())
    for run in ("sharded", "whole"):
        changes = ["--text.name", name, "--text.hidden_layer", "-2", "--output", str(tmp_path / f"{run}_qwen")]
        runs[f"{run}_qwen"] = [*runs[run], *changes]
    results = forked("fsdp2", 2, runs, tmp_path)
    assert len(losses(results["whole"])) == 3
    assert results["sharded"]["sharded"] == results["whole"]["sharded"] == 1.0
    assert results["sharded"]["parameters"] > results["whole"]["parameters"]
    for one, other in (("sharded", "whole"), ("sharded_qwen", "whole_qwen")):
        assert losses(results[one]) == pytest.approx(losses(results[other]), abs=1e-5)
        assert held_out(results[one]) == pytest.approx(held_out(results[other]), abs=1e-5)
    assert losses(results["bf16"]) == pytest.approx(losses(results["whole"]), abs=0.02)
    assert losses(results["bf16"]) != losses(results["whole"])
    for run in ("sharded", "sharded_qwen"):
        pipe = TARFlowPipeline.from_pretrained(tmp_path / run / "pipeline")
        pipe.set_progress_bar_config(disable=True)
        assert pipe("a red circle").images[0].size == (32, 32)

"""Training speed and memory are measured on the right things: the baseline's loss, and bytes that are there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import condition_of, random_images, small_model
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

from tarflow.benchmarks.memory import MODES, TrainingMemory, training_memory
from tarflow.benchmarks.published_training import loss_as_published
from tarflow.benchmarks.random_models import random_inputs, random_model
from tarflow.benchmarks.sampling import METHODS, SamplingPlan, Speed, compare
from tarflow.benchmarks.training import (
    Run,
    TrainingPlan,
    compare_training,
    host_copies,
    loss_differences,
    step_flops,
    with_shared_weights,
)
from tarflow.cli import benchmark
from tarflow.common.machine import copy_size, product_size
from tarflow.flows.likelihood import flow_loss
from tarflow.flows.model import TARFlowModel

TARFLOW = {
    "patch_layout": "channel_first",
    "final_norm": False,
    "start_token": False,
    "scale": "exp",
    "soft_clip": 0.0,
    "positions": "learned",
}
GEGLU = {"mlp": "geglu", "norm": "rms_norm", "qk_norm": True, "post_norm": True, "bias": False, "num_kv_heads": 1}


@pytest.mark.parametrize(
    "settings",
    [
        TARFLOW,
        {**TARFLOW, "conditioning": "class_vectors"},
        {**TARFLOW, "scale": "additive"},
        {"conditioning": "class_prefix", "condition_blocks": "deep"},
        {"conditioning": "prefix", **GEGLU},
        {"positions": "rotary_1d", "start_token": False},
    ],
    ids=["tarflow", "tarflow class", "volume preserving", "starflow class", "starflow text", "1d"],
)
def test_the_published_step_has_the_same_loss_and_gradients(settings: dict[str, Any]) -> None:
    model = small_model(**settings).double()
    x, condition = random_images(model, 3), condition_of(model, 3)
    losses, gradients = [], []
    for loss_of in (lambda: flow_loss(*model(x, **condition)), lambda: loss_as_published(model, x, **condition)):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=1e-12, msg=name)


MEASURED: dict[str, Any] = {"layers_per_block": [2, 2], "width": 128, "in_channels": 4, "sample_size": 16}


def forward_and_backward(model: TARFlowModel, inputs: dict[str, Any], bfloat16: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = flow_loss(*model(**inputs))
    loss.backward()


def beyond_the_weights(memory: TrainingMemory) -> int:
    return memory.peak - memory.parameters - memory.optimizer


@pytest.mark.parametrize("mode", ["none", "every 2nd layer", "both"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_counted_memory_is_what_the_allocator_gives(mode: str, precision: str) -> None:
    counted = training_memory(MEASURED, 4, precision=precision, mode=mode)
    model = TARFlowModel(**MEASURED)
    model.set_checkpointing(*MODES[mode])
    inputs = random_inputs(model, 4, 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward_and_backward(model, inputs, precision == "bfloat16")
    events = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(changes):
        live += size
        peak = max(peak, live)
    # The allocator also sees what attention takes inside itself.
    assert 0.95 * peak < beyond_the_weights(counted) < 1.02 * peak


def test_counted_memory_is_what_torch_counts() -> None:
    counted = training_memory(MEASURED, 4, mode="layer")
    model = TARFlowModel(**MEASURED)
    model.set_checkpointing("layer")
    inputs = random_inputs(model, 4, 0)
    tracker = MemTracker()
    tracker.track_external(model, *inputs.values())
    with tracker:
        forward_and_backward(model, inputs, True)
    total = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    expected = total - counted.parameters - inputs["x"].nbytes
    assert beyond_the_weights(counted) == pytest.approx(expected, rel=0.005)


def test_checkpointed_blocks_keep_their_inputs_only() -> None:
    found = {}
    for mode in ("none", "block"):
        found[mode] = [training_memory({**MEASURED, "layers_per_block": [2] * n}, 4, mode=mode) for n in (2, 4)]
    slack = 4096  # log-dets and other numbers of a block
    fewer, more = found["block"]
    assert more.activations - fewer.activations <= more.block_inputs - fewer.block_inputs + slack
    fewer, more = found["none"]
    assert more.activations > 1.8 * fewer.activations
    assert more.gradients > fewer.gradients
    assert fewer.gradients == fewer.parameters
    assert 2 * fewer.parameters <= fewer.optimizer < 2.01 * fewer.parameters


def test_the_variants_of_training_have_equal_losses() -> None:
    model = small_model(conditioning="class_prefix")
    peaks = {"float32": 1e12, "bfloat16": 1e12}
    variants = ("published", "eager", "layer", "block")
    speeds = compare_training(model, 2, 0, peaks, TrainingPlan(variants=variants, repeats=2, steps=1))
    assert [(row.precision, row.variant) for row in speeds] == [(p, v) for p in peaks for v in variants]
    differences = loss_differences(speeds)
    assert differences["float32"] < 1e-4
    assert differences["bfloat16"] < 0.05
    for row in speeds:
        assert row.error is None and row.steps == 2
        assert row.utilization == pytest.approx(step_flops(model, 2, 0) / 1e12 / (row.step_ms / 1e3))
        assert row.ratio == pytest.approx(1) if row.variant == "published" else row.ratio > 0


def test_variants_share_weights_and_nothing_else() -> None:
    model = small_model()
    own = with_shared_weights(model, "block")
    assert all(a is b for a, b in zip(model.parameters(), own.parameters(), strict=True))
    assert own.checkpoint_blocks and not model.checkpoint_blocks
    with pytest.raises(ValueError, match="unknown variant 'fast'"):
        with_shared_weights(model, "fast")


def test_no_memory_is_said_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Run, *rest: Any) -> None:
        if run.variant == "eager":
            raise torch.OutOfMemoryError
        run.seconds.append(1.0)

    monkeypatch.setattr("tarflow.benchmarks.training.take_steps", fail)
    plan = TrainingPlan(variants=("eager", "block"), precisions=("float32",))
    eager, block = compare_training(small_model(), 2, 0, {"float32": 1e12}, plan)
    assert eager.error == "out of memory" and eager.step_ms is None
    assert block.error is None and block.step_ms == 1000


def test_model_flops_are_six_for_each_use_of_a_weight() -> None:
    model = small_model(conditioning="prefix", condition_blocks="deep", layers_per_block=(1, 2))
    per_layer, attention = 12 * 64 * 64, 64  # width 64: 3 + 1 projections and an MLP of 4 times the width
    expected = 0
    for layers, slots in ((1, 4), (2, 4 + 3)):  # four tokens of eight numbers; the deep block has a prefix of three
        expected += layers * (6 * slots * per_layer + 6 * slots**2 * attention) + 6 * 4 * (8 * 64 + 64 * 16)
    expected += 6 * 3 * 5 * 64
    assert step_flops(model, 1, 3) == expected
    assert step_flops(model, 5, 3) == 5 * expected


def test_measurements_stop_at_their_deadline() -> None:
    over = time.perf_counter() - 1
    plan = TrainingPlan(precisions=("float32",), deadline=over)
    assert compare_training(small_model(), 2, 0, {"float32": 1e12}, plan) == []
    speeds = compare(small_model(), 1, None, None, None, SamplingPlan(methods=METHODS, repeats=3, deadline=over))
    assert [speed.method for speed in speeds] == ["published", "sequential"]


def test_methods_are_reported_as_they_are_measured() -> None:
    model, reports = small_model(sample_size=8), []
    methods = ("published", "sequential", "graphs", "jacobi", "auto")
    rows = compare(model, 2, None, None, None, SamplingPlan(methods=methods, repeats=2, report=reports.append))
    names = [[row.method for row in report] for report in reports]
    assert names[:5] == [list(methods[:count]) for count in range(1, 6)]
    assert len(reports) == 10 and rows == reports[-1]
    for row in rows:
        assert row.residual_max < 1e-3 and row.difference < 1e-3 and row.cache_mb > 0
        assert row.ratio == pytest.approx(1) if row.method == "published" else row.ratio > 0
        assert (row.sweeps == [None, None]) == (row.methods == ["sequential"] * 2)


def test_methods_alone_have_no_ratio() -> None:
    (row,) = compare(small_model(), 1, None, None, None, SamplingPlan(methods=("jacobi",), repeats=1))
    assert row.ratio is None and row.difference is None and row.residual_max < 1e-3


def test_every_batch_size_is_measured_by_the_same_methods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def compare(model: Any, batch: int, cond: Any, null: Any, guidance: Any, plan: SamplingPlan) -> list[Speed]:
        asked.append((batch, plan.methods))
        return [Speed("sequential", batch, 1.0, 1.0, 1.0, 1.0, ["sequential"], [None], 0.0, 0.0, 0.0, 1.0, None)]

    monkeypatch.setattr("tarflow.benchmarks.runs.compare", compare)
    monkeypatch.setattr("tarflow.benchmarks.runs.roofline", lambda *arguments: [])
    sizes = ["--batches", "1", "2", "--device", "cpu", "--output", str(tmp_path)]
    benchmark.main(["sampling", "--model", "quickstart_class", *sizes])
    assert [batch for batch, _ in asked] == [1, 2]
    assert asked[0][1] == asked[1][1] and "sequential" in asked[1][1]


def test_copies_of_weights_are_kept_apart() -> None:
    tensors = [torch.randn(3), torch.randn(2, 2)]
    copies = host_copies(tensors)
    assert all(torch.equal(*pair) for pair in zip(copies, tensors, strict=True))
    assert all(one.data_ptr() != other.data_ptr() for one, other in zip(copies, tensors, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ceilings_are_measured_long_beside_waiting_for_the_device(device: str) -> None:
    """A wait takes some 10 µs on a GPU; of the fastest, 8 TB/s and 2,500 TFLOP/s, and of fast CPUs."""
    bandwidth, speed = (8e12, 2.5e15) if device == "cuda" else (3e11, 5e12)
    assert 2 * copy_size(torch.device(device)) / bandwidth > 4e-4
    assert 2 * product_size(torch.device(device)) ** 3 / speed > 4e-4


def test_random_models_move_numbers_equally_far_at_any_width() -> None:
    changes: list[float] = []
    for width in (64, 1024):
        model = random_model(
            "starflow_imagenet256", "cpu", torch.float32, layers_per_block=[1], width=width, sample_size=4
        )
        inputs = random_inputs(model, 2, 0)
        with torch.no_grad():
            changes.append(float((model(**inputs)[0] - inputs["x"]).std()))
    assert changes[1] == pytest.approx(changes[0], rel=0.5)

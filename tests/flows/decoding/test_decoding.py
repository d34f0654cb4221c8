"""Jacobi decoding, segments, calibration and residuals against sequential decoding."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from flow_kinds import GUIDANCES, MODELS, conditions
from helpers import condition_of, random_images, small_model
from pipelines import draw, make_pipeline
from torch import Tensor

from tarflow import TARFlowPipeline
from tarflow.benchmarks.exactness import exactness, exactness_table
from tarflow.benchmarks.published_sampler import generate_as_published
from tarflow.flows.decoding import jacobi
from tarflow.flows.decoding.calibration_store import FILE_NAME
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.jacobi import decode_jacobi
from tarflow.flows.decoding.method import FAST_TOLERANCE, PROMISES, Decoding, InversionState, residual
from tarflow.flows.decoding.sampling import decode, generate
from tarflow.flows.decoding.sequential import decode_sequential
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.order import reorder, restore
from tarflow.flows.model import TARFlowModel


def grid_model(name: str) -> TARFlowModel:
    """A model of 16 tokens, float64."""
    return small_model(**{**MODELS[name], "sample_size": 8}).double()


@pytest.mark.parametrize("guidance", ["none", "gaussian", "linear_annealed", "temperature"])
@pytest.mark.parametrize("name", MODELS)
def test_all_methods_agree(name: str, guidance: str) -> None:
    model = grid_model(name)
    cond, null = conditions(model, 3)
    z, how = random_images(model, 3), GUIDANCES[guidance]
    expected, log_det = generate(model, z, cond, null, how)
    for decoding in (Decoding("jacobi", 1e-12), Decoding("gs_jacobi", 1e-12, 5), Decoding("gs_jacobi", 1e-12, 16)):
        x, x_log_det = generate(model, z, cond, null, how, decoding=decoding)
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(x_log_det, log_det, rtol=1e-6, atol=1e-7)
    worst, mean = residual(model, expected, z, cond, null, how)
    assert worst.shape == mean.shape == (3,)
    assert worst.max() < 1e-7
    assert residual(model, expected + 0.01, z, cond, null, how)[0].min() > 1e-4
    published = generate_as_published(model.float(), z.float(), *floats(cond, null), how)
    torch.testing.assert_close(published, expected.float(), rtol=0, atol=1e-3)


def floats(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t.float() if t is not None and t.is_floating_point() else t for t in tensors]


def test_tolerances_keep_their_promise_on_trained_weights() -> None:
    """Up to the guidance scale that is stated, against float64; above it there is a warning."""
    name, model = "drawings_class", TARFlowPipeline.from_pretrained("drawings_class").flow
    cond, null = model.condition(torch.tensor([7, 20]), None, 2), model.condition(None, None, 2)
    rows = list(exactness(name, model, cond, null, scales=(1.0, 3.0, 6.0), samples=2))
    assert [row.guidance_scale for row in rows] == [1.0] * 6 + [3.0] * 6 + [6.0] * 6
    for tolerance, (largest, scale) in PROMISES.items():
        fast = tolerance == FAST_TOLERANCE
        kept = [row for row in rows if row.method.startswith("fast") == fast and row.guidance_scale <= scale]
        swept = [row for row in kept if row.method != "sequential"]
        assert len(swept) == (3 if fast else 8)
        assert max(row.largest for row in swept) < largest
        assert max(row.largest for row in swept) > 0.01 * tolerance  # it is no exact method in disguise
    assert f"| {name} | fast: jacobi | {rows[5].largest:.1e} | {rows[11].largest:.1e} |" in exactness_table(rows)


def test_a_warning_above_the_guidance_of_the_promise(caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()
    pipe = make_pipeline()

    def warnings_of(**options: Any) -> list[str]:
        caplog.clear()
        draw(pipe, class_labels=[0, 1], output_type="latent", **options)
        return [record.getMessage() for record in caplog.records if "guidance_scale" in record.getMessage()]

    for decoding, scale, range_end in (("jacobi", 3.5, 3), ("gs_jacobi", 8.0, 3)):
        (text,) = warnings_of(decoding=decoding, segment=4 if decoding[0] == "g" else None, guidance_scale=scale)
        assert text.startswith(
            f"guidance_scale {scale:g} is above {range_end}, up to which decoding with a tolerance of"
        )
        assert (
            'return_residual=True tells how exact they are, and decoding="sequential" is exact to rounding, which'
            in text
        )
    assert len(warnings_of(decoding="jacobi", tolerance=1e-2, guidance_scale=6.5)) == 1
    assert warnings_of(decoding="jacobi", guidance_scale=3.5) == []  # said before
    for options in (
        {"decoding": "jacobi", "guidance_scale": 3.0},
        {"decoding": "jacobi", "tolerance": 1e-2, "guidance_scale": 6.0},
        {"decoding": "jacobi", "tolerance": 0.5, "guidance_scale": 9.0},  # nothing is promised
        {"decoding": "sequential", "guidance_scale": 9.0},
        {"decoding": [Decoding("sequential")] * 2, "guidance_scale": 9.0},
    ):
        assert warnings_of(**options) == []

    def change(pipe: TARFlowPipeline, index: int, step: int, tensors: dict) -> dict:
        if index == when:
            pipe._guidance_scale = 7.0
        return {}

    options = {"decoding": "jacobi", "guidance_scale": 2.0, "callback_on_step_end": change}
    when = pipe.num_timesteps - 1  # no block is left
    assert warnings_of(**options) == []
    when = 0
    (text,) = warnings_of(**options)
    assert text.startswith("guidance_scale 7 is above 3, ")


def test_finished_samples_are_left_out(monkeypatch) -> None:
    model = grid_model("rotary-prefix")
    cond, null = conditions(model, 4)
    z = random_images(model, 4)
    z[:3] = 0.01 * z[:3]  # nearly done after a sweep
    tokens, grid = model.patchify(z)
    block, how = model.blocks[-1], Guidance(1.0)
    batches = []
    whole = InversionState.parameters

    def watched(run: InversionState, x: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        batches.append(len(x))
        return whole(run, x, start, end)

    monkeypatch.setattr(InversionState, "parameters", watched)
    ordered = reorder(tokens, block.config.order, grid)
    x, _, sweeps = decode_jacobi(
        InversionState(block, 4, grid, cond, null, how), ordered, Decoding("gs_jacobi", 1e-6, 8)
    )
    assert sweeps == len(batches)
    assert set(batches) > {4}
    assert min(batches) < 4
    expected, _ = decode(block, tokens, grid, cond, null, how)
    torch.testing.assert_close(restore(x, block.config.order, grid), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("length", [16, 8])
def test_final_tokens_at_the_front_are_swept_no_more(
    monkeypatch: pytest.MonkeyPatch, length: int, together: int
) -> None:
    """Those are at least as many as the sweeps so far, also where some sweeps go before each look at them."""
    monkeypatch.setattr(jacobi, "sweeps_between_checks", lambda device: together)
    model = grid_model("rotary-prefix")
    cond, null = conditions(model, 2)
    tokens, grid = model.patchify(random_images(model, 2))
    block, windows = model.blocks[-1], []
    whole = InversionState.parameters

    def watched(run: InversionState, x: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        windows.append((start, end))
        return whole(run, x, start, end)

    monkeypatch.setattr(InversionState, "parameters", watched)
    ordered = reorder(tokens, block.config.order, grid)
    run = InversionState(block, 2, grid, cond, null, None)
    x, log_scales, _ = decode_jacobi(run, ordered, Decoding("gs_jacobi", 1e-13, length))
    monkeypatch.undo()
    first = [start for start, end in windows if end == length]
    sweeps = len(first) - (length < 16)  # without the last pass over a segment that is not the last
    assert sweeps > 3
    for count in range(sweeps):
        assert first[count] >= count // together * together
    assert first[sweeps - 1] < length
    expected, expected_scales = decode_sequential(InversionState(block, 2, grid, cond, null, None), ordered)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_scales, expected_scales, rtol=0, atol=1e-10)


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("ties", [0.0, 1e-3, 1.0])
def test_segments_whose_tokens_are_all_final_at_once(
    monkeypatch: pytest.MonkeyPatch, ties: float, together: int
) -> None:
    """Also of a network that is not trained yet, and where more sweeps go before a look than tokens are left."""
    monkeypatch.setattr(jacobi, "sweeps_between_checks", lambda device: together)
    model = grid_model("rotary-prefix")
    with torch.no_grad():
        model.blocks[-1].proj_out.weight.mul_(ties)
    cond, null = conditions(model, 2)
    tokens, grid = model.patchify(random_images(model, 2))
    block = model.blocks[-1]
    expected, _ = decode(block, tokens, grid, cond, null)
    for segment in (3, 6, 8):
        for tolerance in (1e-4, 1e-13):
            x, _ = decode(block, tokens, grid, cond, null, None, Decoding("gs_jacobi", tolerance, segment))
            torch.testing.assert_close(x, expected, rtol=0, atol=10 * tolerance + 1e-9)


@pytest.mark.parametrize(("method", "segment"), [("jacobi", None), ("gs_jacobi", 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sweeps_in_16_bits_end_above_rounding(dtype: torch.dtype, method: str, segment: int | None) -> None:
    """With the tolerance as it is given they would go on until each of the 64 tokens is exact."""
    torch.manual_seed(0)
    model = small_model(sample_size=16, width=128, layers_per_block=[2])
    torch.nn.init.normal_(model.blocks[0].proj_out.weight, std=0.02)
    model.to(dtype)
    tokens, grid = model.patchify(random_images(model, 2).float())

    def run() -> InversionState:
        return InversionState(model.blocks[0], 2, grid, None, None, None)

    with torch.no_grad():
        x, _, sweeps = decode_jacobi(run(), tokens, Decoding(method, 1e-4, segment))
        exact, _ = decode_sequential(run(), tokens)
    assert sweeps < 20
    assert (x - exact).abs().max() < 0.1


def test_sweeps_between_checks_change_nothing(monkeypatch) -> None:
    model = grid_model("unconditional")
    z = random_images(model, 2)
    first, _ = generate(model, z, decoding=Decoding("jacobi", 1e-10))
    check = jacobi.sweeps_between_checks
    monkeypatch.setattr(jacobi, "sweeps_between_checks", lambda device: 3 if check(device) == 1 else 1)
    second, _ = generate(model, z, decoding=Decoding("jacobi", 1e-10))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-8)


def test_pipeline_decodings(tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    options = {"class_labels": [0, 1], "output_type": "latent", "guidance_scale": 2.0}
    exact = draw(pipe, decoding="sequential", **options)
    assert not (tmp_path / "pipeline" / FILE_NAME).exists()
    for choice in ({}, {"decoding": "jacobi"}, {"decoding": "gs_jacobi", "segment": 3}, {"decoding": "fast"}):
        assert (draw(pipe, **choice, **options) - exact).abs().max() < (0.1 if "fast" in choice.values() else 1e-3)
    per_block = [Decoding("jacobi"), Decoding("auto")]
    assert (draw(pipe, decoding=per_block, **options) - exact).abs().max() < 1e-3
    assert len(pipe.calibrations) == 2  # the default tolerance, and the fast one
    assert (tmp_path / "pipeline" / FILE_NAME).is_file()
    assert TARFlowPipeline.from_pretrained(tmp_path / "pipeline").calibrations == pipe.calibrations
    output = pipe(class_labels=[0, 1], return_residual=True, decoding="sequential")
    assert output.residual_max.shape == (2,)
    assert output.residual_mean.max() <= output.residual_max.max() < 1e-4
    assert len(pipe(class_labels=0, return_residual=True, return_dict=False)) == 3
    assert len(pipe(class_labels=0, return_dict=False)) == 1


def test_parts_of_a_batch_are_the_batch(monkeypatch) -> None:
    pipe = make_pipeline()
    whole = draw(pipe, class_labels=[0, 1], decoding="sequential")
    monkeypatch.setattr("tarflow.pipeline.call.samples.DENOISED_TOKENS", 1)
    monkeypatch.setattr("tarflow.pipeline.call.samples.DECODED_PIXELS", 1)
    parts = draw(pipe, class_labels=[0, 1], decoding="sequential")
    assert abs(whole - parts).max() < 1e-4


@pytest.mark.parametrize("guidance", ["none", "gaussian", "temperature"])
@pytest.mark.parametrize("name", MODELS)
def test_static_steps_are_the_same_steps(name: str, guidance: str) -> None:
    model, how = grid_model(name), GUIDANCES[guidance]
    steps = FastSteps(None)
    for _ in range(2):  # the second time with what was kept from the first
        cond, null = conditions(model, 2)
        z = random_images(model, 2)
        expected, _ = generate(model, z, cond, null, how)
        x, _ = generate(model, z, cond, null, how, fast=steps)
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    assert len(steps.steps) == len(model.blocks)
    with torch.no_grad():
        model.blocks[0].layers[0].mlp.up.weight *= 1.5
    assert not torch.allclose(generate(model, z, cond, null, how)[0], expected)
    torch.testing.assert_close(
        generate(model, z, cond, null, how, fast=steps)[0], generate(model, z, cond, null, how)[0], rtol=1e-9, atol=1e-9
    )


def test_static_steps_made_in_inference_mode_go_on_outside_of_it() -> None:
    model, steps = small_model().double(), FastSteps(None)
    z = random_images(model, 2)
    with torch.inference_mode():
        inside, _ = generate(model, z, fast=steps)
    outside, _ = generate(model, z, fast=steps)
    assert len(steps.steps) == len(model.blocks)
    torch.testing.assert_close(outside, inside.clone(), rtol=1e-9, atol=1e-9)


def test_static_steps_know_the_grid() -> None:
    model, steps = small_model(sample_size=8).double(), FastSteps(None)
    for height, width in ((8, 8), (4, 16), (16, 4)):  # 16 tokens all
        z = random_images(model, 1, height, width)
        x, _ = generate(model, z, fast=steps)
        torch.testing.assert_close(x, generate(model, z)[0], rtol=1e-9, atol=1e-9)
    assert len(steps.steps) == len(model.blocks)


@pytest.mark.parametrize("name", ["rotary-prefix", "rich-prefix", "learned-vectors"])
def test_static_steps_compile_to_one_graph(name: str) -> None:
    model = grid_model(name)
    cond, null = conditions(model, 2)
    z = random_images(model, 2)
    expected, _ = generate(model, z, cond, null, Guidance(1.0))
    x, _ = generate(model, z, cond, null, Guidance(1.0), fast=FastSteps("eager"))  # captured whole, run as it is
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_pipeline_with_fast_steps() -> None:
    pipe = make_pipeline()
    options = {"class_labels": [0, 1], "output_type": "latent", "decoding": "sequential"}
    expected = draw(pipe, **options)
    pipe.enable_fast_decoding(None)
    torch.testing.assert_close(draw(pipe, **options), expected)
    assert pipe._fast_steps.steps
    pipe.disable_fast_decoding()
    torch.testing.assert_close(draw(pipe, **options), expected)


def test_a_capture_that_fails_leaves_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def failing(graph: Any, pool: Any) -> Iterator[None]:
        raise RuntimeError("out of memory")
        yield

    model, steps = small_model(), FastSteps(None)
    z = random_images(model, 1)
    generate(model, z, fast=steps)
    for name in ("Stream", "current_stream", "stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", failing)
    for _, step in steps.steps.values():
        step.captures = True
    for _ in range(2):  # tried again, not replayed
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(model, z, fast=steps)
    assert all(step.graph is None for _, step in steps.steps.values())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="must be one of auto, sequential, jacobi, gs_jacobi, parallel, got 'magic'"):
        Decoding("magic")
    with pytest.raises(ValueError, match=r"tolerance must be positive, got 0"):
        Decoding("jacobi", 0)
    with pytest.raises(ValueError, match="'gs_jacobi' needs a segment"):
        Decoding("gs_jacobi")
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        Decoding("gs_jacobi", segment=0)
    model = small_model()
    z = random_images(model, 1)
    with pytest.raises(ValueError, match="segment has 5 tokens, but the sequence only 4"):
        generate(model, z, decoding=Decoding("gs_jacobi", segment=5))
    with pytest.raises(ValueError, match="got 1 decodings for 2 blocks"):
        generate(model, z, decoding=[Decoding()])
    with pytest.raises(ValueError, match="got 'quick'"):
        make_pipeline()(class_labels=0, decoding="quick")


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
def test_numbers_that_are_not_finite_are_named(method: str) -> None:
    model = small_model(conditioning="class_prefix")
    z = random_images(model, 2)
    given = condition_of(model, 2)["class_labels"]
    with torch.no_grad():
        model.blocks[0].proj_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"first in block 0 \(0 is next to the data\) at token 0 of 4"):
        generate(model, z, model.condition(given, None, 2), decoding=Decoding(method))

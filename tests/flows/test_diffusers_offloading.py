"""Weights of flows and students that wait elsewhere, or in another dtype: right numbers by everything that reads them.

Weights that are not at hand are NaN here, or have no values at all, so whatever used them would be noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import ModelMixin
from diffusers.hooks.group_offloading import ModuleGroup
from helpers import condition_of, random_images, small_model
from pipelines import draw, make_pipeline
from students import with_student

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.flows.decoding.calibration import conditions_key
from tarflow.flows.decoding.calibration_store import fingerprint
from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.decoding.method import Decoding, residual
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.denoising import score_denoise
from tarflow.flows.editing import HeldFlow
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.likelihood import log_prob, token_log_prob

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is offloaded to a disk leaves NaN in memory, not the old numbers by chance."""
    offload = ModuleGroup._offload_to_disk

    def offload_all(group: ModuleGroup) -> None:
        offload(group)
        for tensor in group.tensor_to_key:
            tensor.data.fill_(torch.nan if tensor.is_floating_point() else 0)

    monkeypatch.setattr(ModuleGroup, "_offload_to_disk", offload_all)


def by_leaves(model: Any, folder: Path) -> None:
    model.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(folder / "groups"))


def by_blocks(model: Any, folder: Path, blocks: int = 1) -> None:
    folder = folder / "groups"
    model.enable_group_offload(
        CPU, offload_type="block_level", num_blocks_per_group=blocks, offload_to_disk_path=str(folder)
    )


def by_pairs_of_blocks(model: Any, folder: Path) -> None:
    by_blocks(model, folder, 2)


def by_accelerate(model: Any, folder: Path) -> None:
    cpu_offload(model, execution_device=CPU)


WAYS = {"leaves": by_leaves, "blocks": by_blocks, "pairs": by_pairs_of_blocks, "accelerate": by_accelerate}
MODELS: dict[str, dict[str, Any]] = {
    "class_vectors": {"conditioning": "class_vectors", "learned_prior": True, "positions": "learned", "qk_norm": True},
    "prefix": {"conditioning": "prefix", "learned_denoiser": "conditional", "denoiser_layers": 2, "norm": "rms_norm"},
    "coupling": {"block": "coupling", "mixing": "lu", "actnorm": True, "learned_prior": True},
    "inverse": {"block": "inverse_autoregressive", "conditioning": "class_prefix"},
}


def all_uses(model: TARFlowModel) -> dict[str, Any]:
    """Numbers of everything that a flow is used for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 6, 6, generator=generator)
    labels = torch.tensor([0, 2]) if model.config.conditioning.startswith("class") else None
    cond = torch.randn(2, 3, 5, generator=generator) if model.config.conditioning == "prefix" else None
    condition = {"class_labels": labels, "cond": cond}
    seen, null = (model.condition(*pair, 2) for pair in ((labels, cond), (None, cond)))
    guided = None if model.config.block == "inverse_autoregressive" or labels is None else Guidance(1.0)
    with torch.no_grad():
        z, log_det = model(x, **condition)
        uses = {"z": z, "log_det": log_det, "log_prob": log_prob(model, x, **condition)}
        uses["noise"] = model.scale_noise(z)
        methods = [None]
        if not model.blocks[0].one_pass:
            methods += [Decoding("jacobi"), Decoding("gs_jacobi", segment=4)]
            uses["shares"] = token_log_prob(model, x, **condition)
            hole = torch.zeros(2, 3, 3, dtype=torch.bool)
            hole[:, 1] = True
            held = HeldFlow(model, x, hole, **condition)
            uses["filled"] = held.inverse(held.forward(x)[0])[0]
        for number, decoding in enumerate(methods):
            made, _ = generate(model, z, seen, null, guided, decoding=decoding)
            uses[f"made {number}"], uses[f"residual {number}"] = made, residual(model, made, z, seen, null, guided)[0]
        if model.denoiser is not None:
            uses["score"] = model.scaled_score(x, **condition)
    uses["denoised"] = score_denoise(model, x, 0.3, **condition)
    return uses


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_use_brings_the_weights(kind: str, way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_model(sample_size=6, layers_per_block=(1, 1, 1), **MODELS[kind])
    if model.prior_variance is not None:
        model.prior_variance.uniform_(0.5, 1.5)
    expected, name = all_uses(model), fingerprint(model)
    WAYS[way](model, tmp_path)
    for use, numbers in all_uses(model).items():
        torch.testing.assert_close(
            numbers, expected[use], rtol=1e-4, atol=1e-4, msg=lambda text, use=use: f"{use}: {text}"
        )
    assert fingerprint(model) == name
    if way != "accelerate":
        assert all(parameter.isnan().all() for parameter in model.parameters())
    with pytest.raises(ValueError, match="load it anew"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    pipe = make_pipeline("class_vectors", learned_denoiser="conditional", denoiser_layers=1, learned_prior=True)
    with_student(pipe).save_pretrained(folder)
    return folder


def loaded(folder: Path, **options: Any) -> TARFlowPipeline:
    pipe = TARFlowPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def all_calls(pipe: TARFlowPipeline) -> dict[str, np.ndarray]:
    options = {"class_labels": [0, 1], "guidance_scale": 2.0}
    picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    calls = {name: draw(pipe, decoding=name, **options) for name in ("sequential", "jacobi", "auto", "student")}
    calls["learned"] = draw(pipe, decoding="sequential", denoise="learned", **options)
    calls["log_prob"] = pipe.log_likelihood(picture, generator=torch.Generator().manual_seed(1)).log_prob.numpy()
    return calls


def pipeline_by_leaves(pipe: TARFlowPipeline, folder: Path) -> None:
    pipe.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


def pipeline_by_blocks(pipe: TARFlowPipeline, folder: Path) -> None:
    pipe.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder))


def flow_on_a_disk(pipe: TARFlowPipeline, folder: Path) -> None:
    places = {"blocks.0": "cpu", "blocks.1": "disk", "denoiser": "disk", "prior_variance": "cpu"}
    pipe.flow = TARFlowModel.from_pretrained(
        pipe.config["_name_or_path"], subfolder="flow", device_map=places, offload_folder=folder
    )
    assert pipe.flow.blocks[1].proj_in.weight.device.type == "meta"


def flow_placed_by_size(pipe: TARFlowPipeline, folder: Path) -> None:
    size = sum(tensor.nbytes for tensor in pipe.flow.blocks[0].state_dict().values())
    pipe.flow = TARFlowModel.from_pretrained(
        pipe.config["_name_or_path"],
        subfolder="flow",
        device_map="auto",
        max_memory={"cpu": int(2.5 * size)},
        offload_folder=folder,
    )
    places = pipe.flow.hf_device_map
    assert "disk" in places.values() and set(places) == {"blocks.0", "blocks.1", "denoiser", "prior_variance"}


@pytest.mark.parametrize(
    "offload",
    [pipeline_by_leaves, pipeline_by_blocks, flow_on_a_disk, flow_placed_by_size],
    ids=lambda way: way.__name__,
)
def test_pipelines_of_offloaded_parts(
    offload: Callable[[TARFlowPipeline, Path], None], pipeline_folder: Path, tmp_path: Path
) -> None:
    expected, pipe = all_calls(loaded(pipeline_folder)), loaded(pipeline_folder)
    offload(pipe, tmp_path)
    for name, numbers in all_calls(pipe).items():
        np.testing.assert_allclose(numbers, expected[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_fast_steps_of_groups_keep_nothing_on_the_device(tmp_path: Path) -> None:
    model, fast = small_model(sample_size=8), FastSteps(None)
    z = random_images(model, 2)
    expected = generate(model, z, fast=fast)[0]
    assert fast.steps
    by_blocks(model, tmp_path)
    torch.testing.assert_close(generate(model, z, fast=fast)[0], expected, rtol=0, atol=1e-5)
    assert fast.steps == {}


def test_calibrations_know_where_weights_wait_and_compute(tmp_path: Path) -> None:
    model = small_model()

    def key() -> str:
        return conditions_key(model, 2, (4, 4), None, 1e-4)

    plain = key()
    by_blocks(model, tmp_path)
    assert key() == f"{plain} | offloaded"
    model = small_model().to(torch.float64)
    model._hf_hook = SimpleNamespace(execution_device=torch.device("meta"))  # it waits on the CPU
    assert key().startswith("meta | float64 | batch 2")


def test_a_flow_is_on_one_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model().save_pretrained(tmp_path)
    refused = r"TARFlowModel on 2 accelerators \(cuda:0, cuda:1\)"
    with pytest.raises(ValueError, match=refused):
        TARFlowModel.from_pretrained(tmp_path, device_map={"blocks.0": 0, "blocks.1": "cuda:1"})
    model = TARFlowModel.from_pretrained(tmp_path, device_map="cpu")
    monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(lambda cls, *_, **options: model))
    model.hf_device_map = {"blocks.0": 0, "blocks.1": 1, "denoiser": "cpu"}  # as "auto" may find
    with pytest.raises(ValueError, match=refused):
        TARFlowModel.from_pretrained(tmp_path, device_map="auto")
    model.hf_device_map = {
        "blocks.0": 0,
        "blocks.1": torch.device("cuda", 0),
        "denoiser": "cpu",
        "prior_variance": "disk",
    }
    assert TARFlowModel.from_pretrained(tmp_path, device_map="auto") is model


# Layerwise casting


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_computes_in_the_flows_dtype(kind: str, storage: torch.dtype) -> None:
    """The same as of weights that were rounded once to the storage's dtype."""
    torch.manual_seed(0)
    model = small_model(sample_size=6, layers_per_block=(1, 1), **MODELS[kind])
    rounded = small_model(sample_size=6, layers_per_block=(1, 1), **MODELS[kind])
    state = model.state_dict()
    cast = [name for name in state if any(f".{part}." in name for part in ("qkv", "proj", "up", "down"))]
    rounded.load_state_dict({name: v.to(storage).to(v) if name in cast else v for name, v in state.items()})
    model.enable_layerwise_casting(storage_dtype=storage)
    stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert all(stored[name] == (storage if name in cast else state[name].dtype) for name in stored)
    expected = all_uses(rounded)
    for use, numbers in all_uses(model).items():
        torch.testing.assert_close(
            numbers, expected[use], rtol=1e-4, atol=1e-4, msg=lambda text, use=use: f"{use}: {text}"
        )


def test_layerwise_casting_saves_memory_and_a_student_takes_it(pipeline_folder: Path) -> None:
    pipe = loaded(pipeline_folder)
    plain = draw(pipe, class_labels=[0, 1], decoding="student")
    before = pipe.student.get_memory_footprint()
    pipe.student.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert pipe.student.get_memory_footprint() < 0.45 * before
    cast = draw(pipe, class_labels=[0, 1], decoding="student")
    assert 0 < np.abs(cast - plain).max() < 0.1


def test_training_with_layerwise_casting() -> None:
    """The parts that are not cast learn; the others' gradients are those of the rounded weights."""
    torch.manual_seed(0)
    model = small_model(**MODELS["class_vectors"], layers_per_block=(1, 1))
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dtype == torch.float32)
        assert parameter.requires_grad or ".layers." in name
    z, log_det = model(random_images(model, 3), **condition_of(model, 3))
    (z.square().mean() - log_det.mean()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name

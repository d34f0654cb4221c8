"""Flows and students that are compiled or exported, and pipelines of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from flow_kinds import flow_of
from pipelines import draw, make_pipeline
from students import lone_student, with_student

from tarflow import TARFlowPipeline

#: What compilers are given, traced by all of `torch.compile` but its last step, which needs a C compiler.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    active = _AttentionBackendRegistry._active_backend
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.parametrize("kind", ["class_vectors", "prefix", "coupling"])
def test_a_flow_compiles_to_one_graph_that_serves_all_labels(kind: str) -> None:
    model, x, condition = flow_of(kind)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    for turn in range(2):
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            for found, expected in zip(compiled(x, **condition), model(x, **condition), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if "class_labels" in condition:
            condition["class_labels"] = condition["class_labels"].flip(0)


def test_layers_compile_one_by_one() -> None:
    model, x, _ = flow_of("plain")
    expected = model(x)[0]
    model.compile_repeated_blocks(fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_flow_takes_a_backend() -> None:
    model, x, condition = flow_of("prefix")
    expected = model(x, **condition)[0]
    model.set_attention_backend("_native_math")
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(compiled(x, **condition)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["class_vectors", "coupling"])
def test_a_flow_is_exported_with_class_labels(kind: str) -> None:
    model, x, condition = flow_of(kind)
    assert "class_labels" in condition
    exported = torch.export.export(model, (x,), condition).module()
    condition["class_labels"] = condition["class_labels"].flip(0)
    for found, expected in zip(exported(x, **condition), model(x, **condition), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="class labels must be 0 to 3"):  # outside a graph they are checked
        model(x, class_labels=torch.full((len(x),), 7))


def test_a_student_compiles_and_is_exported() -> None:
    student, z = (
        lone_student(conditioning="class_prefix", num_classes=3, max_guidance_scale=3.0),
        torch.randn(2, 2, 4, 4),
    )
    labels, weight = torch.tensor([0, 3]), torch.tensor(0.5)
    expected = student(z, labels, None, weight)
    compiled = torch.compile(student, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(compiled(z, labels, None, weight), expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(student, (z, labels, None, weight)).module()
    torch.testing.assert_close(exported(z, labels, None, weight), expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline_of_compiled_parts_draws_checks_and_saves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = with_student(make_pipeline())
    calls = {"sequential": {}, "jacobi": {}, "student": {"guidance_scale": 2.0}}
    expected = {name: draw(pipe, class_labels=[0, 1], decoding=name, **options) for name, options in calls.items()}
    pipe.flow, pipe.student = (torch.compile(part, backend="eager") for part in (pipe.flow, pipe.student))
    pipe.save_pretrained(tmp_path)
    loaded = TARFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert not any(name.startswith("_orig_mod") for name in loaded.flow.state_dict())
    for some in (pipe, loaded):
        for name, options in calls.items():
            found = draw(some, class_labels=[0, 1], decoding=name, **options)
            np.testing.assert_allclose(found, expected[name], rtol=1e-3, atol=1e-3, err_msg=name)

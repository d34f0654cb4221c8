"""The call of a pipeline in its steps: what it is asked for, resolved once, and steps that a subclass may change."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from pipelines import make_pipeline

from tarflow import TARFlowPipeline
from tarflow.data.config import DataConfig
from tarflow.evaluation.images.sets import DataImages
from tarflow.flows.decoding.method import DEFAULT_TOLERANCE, FAST_TOLERANCE, Decoding
from tarflow.flows.layers.guidance import Guidance
from tarflow.pipeline.call.settings import Sampling, Subjects, resolve_decoding, resolve_size


@pytest.mark.parametrize(
    ("asked", "tolerance", "segment", "found"),
    [
        ("auto", None, None, Decoding("auto", DEFAULT_TOLERANCE)),
        ("fast", None, None, Decoding("auto", FAST_TOLERANCE)),
        ("jacobi", 0.5, None, Decoding("jacobi", 0.5)),
        ("gs_jacobi", None, None, Decoding("gs_jacobi", DEFAULT_TOLERANCE, 4)),
        ("gs_jacobi", None, 5, Decoding("gs_jacobi", DEFAULT_TOLERANCE, 5)),
        ([Decoding(), Decoding("jacobi")], None, None, [Decoding(), Decoding("jacobi")]),
        ("student", None, None, None),
    ],
)
def test_decodings_by_name(asked: Any, tolerance: float | None, segment: int | None, found: Any) -> None:
    assert resolve_decoding(asked, tolerance, segment, 16) == found


def test_sizes() -> None:
    pipe = make_pipeline("none")
    assert resolve_size(pipe, None, None, None) == ((8, 4, 4), "1:1")
    assert resolve_size(pipe, 32, 64, None) == ((8, 4, 8), "16:9")
    shape, ratio = resolve_size(pipe, None, None, "16:9")
    assert ratio == "16:9" and shape[1] < shape[2]


def test_what_a_call_is_asked_for_cannot_change() -> None:
    settings = {"subjects": Subjects(), "device": torch.device("cpu"), "shape": (8, 4, 4), "aspect_ratio": "1:1"}
    settings |= {"guidance_scale": 1.0, "guidance": Guidance(0.0), "decoding": None, "denoise": False, "decoder": "vae"}
    call = Sampling(**settings)
    with pytest.raises(FrozenInstanceError):
        call.denoise = True  # type: ignore[misc]
    assert call.by_student and not call.asks_flow
    assert Sampling(**settings, return_residual=True).asks_flow


class Telling(TARFlowPipeline):
    """Writes down which of its steps were taken."""

    taken: tuple[str, ...] = ()

    def tell(self, name: str) -> None:
        self.taken = (*self.taken, name)

    def check_inputs(self, *arguments: Any) -> None:
        self.tell("check_inputs")
        super().check_inputs(*arguments)

    def encode_prompt(self, *arguments: Any, **options: Any) -> Any:
        self.tell("encode_prompt")
        return super().encode_prompt(*arguments, **options)

    def prepare_latents(self, *arguments: Any) -> torch.Tensor:
        self.tell("prepare_latents")
        return super().prepare_latents(*arguments)

    def remove_noise(self, *arguments: Any, **options: Any) -> torch.Tensor:
        self.tell("remove_noise")
        return super().remove_noise(*arguments, **options)

    def decode_latents(self, *arguments: Any) -> torch.Tensor:
        self.tell("decode_latents")
        return super().decode_latents(*arguments)


def test_a_subclass_may_change_each_step() -> None:
    plain = make_pipeline("prefix")
    pipe = Telling.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"guidance_scale": 2.0, "output_type": "pt", "decoding": "sequential"}
    found = pipe("a red ring", generator=torch.Generator().manual_seed(1), **options).images
    assert pipe.taken == ("check_inputs", "encode_prompt", "prepare_latents", "remove_noise", "decode_latents")
    assert torch.equal(found, plain("a red ring", generator=torch.Generator().manual_seed(1), **options).images)


def test_tools_take_the_steps_of_a_subclass() -> None:
    pipe = Telling.from_pipe(make_pipeline("none"))
    pipe.set_progress_bar_config(disable=True)
    pipe.vary(torch.rand(1, 3, 32, 32), 0.5)
    assert pipe.taken == ("remove_noise", "decode_latents")


def test_no_student_to_check() -> None:
    with pytest.raises(ValueError, match="this pipeline has no student: train one"):
        make_pipeline("none").check_student()


def test_pictures_of_data_still_have_names_and_captions() -> None:
    images = DataImages(DataConfig(source="drawings", image_size=16), num=2)
    assert images.data.class_names and images.data.has_captions
    assert images.data.caption(0)

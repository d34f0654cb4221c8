"""One name for one thing: in Python, in settings, on the command line and on the page."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing

import pytest
import torch
from helpers import ROOT
from pipelines import make_pipeline

from tarflow import TARFlowPipeline
from tarflow.cli import generate
from tarflow.demo.drawing import Request, decodings
from tarflow.evaluation.reports.settings import ReportConfig
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.flows.decoding.names import METHODS
from tarflow.pipeline.call import settings
from tarflow.pipeline.call.choices import DECODERS, DECODINGS, DENOISE, STUDENT


def choices(name: str) -> tuple[str, ...]:
    """Of an option of `tarflow generate`."""
    return tuple(generate.parser()._option_string_actions[name].choices)


def test_choices_are_the_same_everywhere() -> None:
    assert choices("--decoding") == DECODINGS
    assert choices("--denoise") == DENOISE
    assert choices("--decoder") == DECODERS
    for config in (GenerationConfig, ReportConfig):
        hints = typing.get_type_hints(config)
        assert typing.get_args(hints["decoding"]) == DECODINGS
        assert set(DENOISE) <= {value for part in typing.get_args(hints["denoise"]) for value in typing.get_args(part)}
    assert decodings(make_pipeline("none")) == [name for name in DECODINGS if name != STUDENT]
    assert set(DECODINGS) - {"fast", STUDENT} < set(METHODS)
    table = re.findall(r'^\| `"(\w+)"', (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(DECODINGS)


def test_what_draws_has_the_same_defaults() -> None:
    call = inspect.signature(TARFlowPipeline.__call__).parameters
    fields = {field.name: field.default for field in dataclasses.fields(Request)}
    args = generate.parser().parse_args(["--out", "x.png"])
    assert call["decoding"].default == fields["decoding"] == args.decoding == "auto"
    assert call["denoise"].default is call["decoder"].default is args.denoise is args.decoder is None


def test_old_options_keep_working() -> None:
    args = generate.parser().parse_args(["--out", "x.png", "--guidance", "3", "--decode-with", "learned"])
    generate.check(args)
    assert (args.guidance, args.denoise, args.decoder) == (3.0, "learned", "vae")
    new = generate.parser().parse_args(["--out", "x.png", "--guidance_scale", "3", "--denoise", "learned"])
    assert (new.guidance, new.denoise, new.decoder) == (3.0, "learned", None)


def test_no_noise_is_removed_by_either_name() -> None:
    pipe = make_pipeline("none")
    images = [
        pipe(num_images=1, denoise=name, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for name in (False, "none", "score")
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_segments_need_not_be_counted() -> None:
    pipe = make_pipeline("none")
    calls = [
        pipe(
            num_images=2,
            decoding="gs_jacobi",
            tolerance=1e-6,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        ).images
        for options in ({}, {"segment": 4})
    ]
    assert (pipe.flow.config.sample_size // pipe.flow.config.patch_size) ** 2 == 16
    assert torch.equal(*calls)


def test_other_sizes_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, said = make_pipeline("none"), []
    monkeypatch.setattr(settings.logger, "warning_once", said.append)
    side = pipe.flow.config.sample_size * pipe.codec.factor
    pipe(num_images=1, aspect_ratio="5:4", decoding="sequential")
    pipe(num_images=1, decoding="sequential")
    assert said == []
    pipe(num_images=1, height=2 * side, width=2 * side, decoding="sequential")
    assert f"trained on pictures of about {side} × {side} pixels; at {2 * side} × {2 * side}" in said[0]


@pytest.mark.parametrize("generator", [42, [42], "a seed"])
def test_a_bare_seed_is_no_generator(generator: object) -> None:
    pipe = make_pipeline("none")
    picture = pipe(num_images=1, decoding="sequential").images
    for call in (
        lambda: pipe(num_images=1, generator=generator),
        lambda: pipe.vary(picture, 0.5, generator=generator),
    ):
        with pytest.raises(
            ValueError, match=r"generator must be a torch\.Generator, got .*: give torch\.Generator\(\)"
        ):
            call()

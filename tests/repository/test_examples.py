"""The examples in the docstrings that a user starts from."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from tarflow import LatentCodec, TARFlowModel, TARFlowPipeline
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.denoising import score_denoise
from tarflow.flows.likelihood import log_prob

STARTS = [TARFlowModel, TARFlowPipeline, LatentCodec, log_prob, generate, score_denoise]


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.__name__)
def test_the_example_gives_what_it_says(start: Any) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(start, start.__name__, globs={})
    assert len(example.examples) > 4, f"{start.__name__} has no example"
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(example, out=told.append).failed == 0, "".join(told)

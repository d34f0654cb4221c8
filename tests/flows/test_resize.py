"""A trained model for another size: what it says of the same picture stays nearly the same."""

from __future__ import annotations

import pytest
import torch
from helpers import condition_of, random_images, small_model

from tarflow.flows.resize import interpolate_rows, resized_model


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_same_size_changes_nothing(positions: str) -> None:
    model = small_model(positions=positions, conditioning="class_prefix", learned_prior=True)
    resized = resized_model(model, model.config.sample_size)
    x, condition = random_images(model, 2), condition_of(model, 2)
    for found, expected in zip(resized(x, **condition), model(x, **condition), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_rotary_positions_span_the_same_lengths() -> None:
    model = small_model(positions="rotary")
    resized = resized_model(resized_model(model, 8), 16)
    assert (resized.config.sample_size, resized.config.position_length) == (16, 2)
    for old, new in zip(model.blocks, resized.blocks, strict=True):
        small, large = old.context(None, (2, 2)).rotation[0], new.context(None, (8, 8)).rotation[0]
        torch.testing.assert_close(large.view(8, 8, -1)[::4, ::4].reshape(4, -1), small)


def test_learned_positions_are_interpolated() -> None:
    middle = (torch.arange(4) + 0.5) / 4  # of four places on a side of length 1
    rows = torch.stack([middle.repeat_interleave(4), middle.repeat(4)], dim=1)  # (16, 2): row and column
    found = interpolate_rows(rows, 4, 8).view(8, 8, 2)
    places = (torch.arange(8) + 0.5) / 8
    torch.testing.assert_close(found[1:-1, 1:-1, 0], places[1:-1, None].expand(6, 6))  # the outermost have no neighbour
    torch.testing.assert_close(found[1:-1, 1:-1, 1], places[None, 1:-1].expand(6, 6))
    model = small_model(positions="learned", learned_prior=True)
    resized = resized_model(model, 8)
    assert resized.blocks[0].pos_embed.shape[0] == resized.prior_variance.shape[0] == 16
    x = random_images(resized, 2)
    z, _ = resized(x)
    torch.testing.assert_close(resized.inverse(z)[0], x, rtol=0, atol=1e-4)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="'rotary_1d' cannot be rescaled from a size of 4 to 8"):
        resized_model(small_model(positions="rotary_1d"), 8)
    with pytest.raises(ValueError, match="multiple of patch_size"):
        resized_model(small_model(), 7)

"""How many images a call may draw at once."""

from __future__ import annotations

import pytest
import torch
from pipelines import make_pipeline

from tarflow.flows.layers.kv_cache import KVCache
from tarflow.pipeline.call.limits import (
    CACHES,
    available_bytes,
    block_bytes,
    check_num_images,
    estimate_bytes,
    largest_count,
)


def test_estimate_holds_the_cache_and_grows_with_what_is_asked():
    pipe = make_pipeline("prefix")
    block = pipe.flow.blocks[-1].config
    slots = pipe.config.max_sequence_length + 16
    transformer = block.transformer
    sizes = (transformer.layers, 2 * 5, transformer.num_kv_heads, slots, transformer.head_dim)
    cache = KVCache(*sizes, torch.device("cpu"), torch.float32).keys_values.nbytes
    without_layers = block_bytes(block, 5, 16, 8, True, 4) - CACHES * cache
    assert 0 < without_layers < block_bytes(block, 5, 16, 8, True, 4)
    small = estimate_bytes(pipe, 2, guided=False)
    assert 5 * 8 * 16 * 4 < small <= estimate_bytes(pipe, 2) < estimate_bytes(pipe, 3)
    assert estimate_bytes(pipe, 2, height=64, width=64) > 3.9 * small
    assert estimate_bytes(make_pipeline("none", vae=False), 2) < small  # no decoder


def test_largest_count_is_the_largest_that_fits():
    pipe = make_pipeline("class_prefix")
    available = estimate_bytes(pipe, 7)
    assert largest_count(pipe, 100, available=available) == 7
    assert largest_count(pipe, 3, available=available) == 3
    check_num_images(pipe, 7, available=available)
    with pytest.raises(ValueError, match=r"8 images at once need about 0\.0 GB .* available on 'cpu': at most 7 fit"):
        check_num_images(pipe, 8, available=available)
    with pytest.raises(ValueError, match=r"1 image at once .* not even one fits"):
        check_num_images(pipe, 1, available=1000)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        check_num_images(pipe, 0)


def test_an_absurd_count_does_not_fit_this_machine():
    pipe = make_pipeline("none")
    check_num_images(pipe, 2)
    assert available_bytes("cpu") > 1e7
    with pytest.raises(ValueError, match=r"1,000,000,000 images at once need about [\d,]+ GB"):
        check_num_images(pipe, 1_000_000_000)

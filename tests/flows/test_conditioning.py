"""The conditions of docs/conditioning.md: an embedding and a map as prefix tokens, in tiny flows that learn them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.flows.likelihood import flow_loss
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline

SIGMA = 0.1


def embedding_tokens(embedding: Tensor) -> Tensor:
    """A vector for each picture, (B, E), as one token, (B, 1, E)."""
    return embedding[:, None]


def depth_tokens(depth: Tensor, patch: int) -> Tensor:
    """A map (B, 1, H, W) as its patches, (B, H·W / patch², patch²), row after row."""
    return F.pixel_unshuffle(depth, patch).flatten(2).mT


def embeddings(count: int) -> tuple[Tensor, Tensor]:
    """Pictures whose three channels are the first numbers of a vector of four, and the vectors as tokens."""
    vectors = torch.randn(count, 4)
    return vectors[:, :3, None, None].expand(-1, -1, 4, 4), embedding_tokens(vectors)


def depths(count: int) -> tuple[Tensor, Tensor]:
    """Pictures whose left and right halves are bright where a map of 4 × 4 is far, and its patches as tokens."""
    halves = torch.randn(count, 1, 1, 2).sign()
    depth = halves.repeat_interleave(2, 3).expand(-1, -1, 4, -1)
    return depth.expand(-1, 3, -1, -1), depth_tokens(depth, 2)


def test_a_map_becomes_its_patches() -> None:
    depth = torch.arange(16.0).view(1, 1, 4, 4)
    assert depth_tokens(depth, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("data", [embeddings, depths])
def test_a_tiny_flow_follows_a_new_condition(data: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    flow = TARFlowModel(
        in_channels=3,
        sample_size=4,
        patch_size=2,
        layers_per_block=(1, 1),
        width=32,
        head_dim=32,
        conditioning="prefix",
        cond_dim=4,
    )
    optimizer = torch.optim.AdamW(flow.parameters(), lr=5e-3)
    for _ in range(120):
        x, tokens = data(64)
        keep = torch.rand(len(tokens), 1, 1) >= 0.1
        optimizer.zero_grad()
        flow_loss(*flow(x + SIGMA * torch.randn(x.shape), cond=tokens * keep)).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
    pipe = TARFlowPipeline(flow.eval(), None, noise_std=SIGMA)
    pipe.set_progress_bar_config(disable=True)
    x, tokens = data(32)
    options = {"prompt_embeds": tokens, "output_type": "latent"}
    for scale in (1.0, 1.5):
        away = {"negative_prompt_embeds": torch.zeros_like(tokens)} if scale > 1 else {}
        made = pipe(generator=torch.Generator().manual_seed(0), guidance_scale=scale, **options, **away).images
        right, other = (made - x).abs().mean(), (made - x.roll(1, 0)).abs().mean()
        assert right < 0.5 * other, f"samples do not follow the condition at guidance scale {scale}"


def test_conditions_of_another_shape_are_sentences() -> None:
    flow = TARFlowModel(in_channels=3, sample_size=4, width=32, head_dim=32, conditioning="prefix", cond_dim=16)
    x = torch.zeros(2, 3, 4, 4)
    for cond, shape in ((torch.zeros(2, 4, 9), r"\(2, 4, 9\)"), (torch.zeros(2, 16), r"\(2, 16\)")):
        with pytest.raises(ValueError, match=rf"cond must have the shape \(2, L, 16\), got {shape}"):
            flow(x, cond=cond)
        if cond.ndim == 3:
            pipe = TARFlowPipeline(flow, None)
            with pytest.raises(ValueError, match=rf"cond must have the shape \(2, L, 16\), got {shape}"):
                pipe(prompt_embeds=cond, output_type="latent")

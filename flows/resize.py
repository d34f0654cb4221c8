"""A trained model for another size of pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.flows.model import TARFlowModel


def resized_model(model: TARFlowModel, sample_size: int) -> TARFlowModel:
    """A copy of a model, to go on training at another size of the latents.

    Rotary positions keep the lengths of their axes, so the same places of a picture keep their positions; learned
    positions and a learned prior variance are interpolated between the old ones' places.

    Args:
        model: the trained model.
        sample_size: H = W of the new latents, a multiple of the patch size.

    Raises:
        ValueError: for positions in one dimension, which have no scale, or a size that does not fit the patches.
    """
    old, patch = model.config.sample_size, model.config.patch_size
    if sample_size != old and model.config.positions == "rotary_1d":
        raise ValueError(f"positions 'rotary_1d' cannot be rescaled from a size of {old} to {sample_size}")
    sizes = {"sample_size": sample_size, "position_length": model.config.position_length or old // patch}
    resized = TARFlowModel(**{**model.arguments, **sizes})
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("pos_embed") or name == "prior_variance":  # a row for each token, in row-major order
            state[name] = interpolate_rows(value, old // patch, sample_size // patch)
    resized.load_state_dict(state)
    return resized.to(model.device).train(model.training)


def interpolate_rows(rows: Tensor, old: int, new: int) -> Tensor:
    """(old², D) numbers on a square grid at the places of a grid of new² points over the same square, (new², D)."""
    grid = rows.T.reshape(1, -1, old, old).to(torch.promote_types(rows.dtype, torch.float32))
    grid = F.interpolate(grid, (new, new), mode="bilinear", align_corners=False)
    return grid[0].flatten(1).T.to(rows.dtype).contiguous()

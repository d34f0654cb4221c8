"""What a caller gives as a condition, in the form that the blocks take."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def as_condition(
    config: Any, class_labels: Tensor | None, cond: Tensor | None, batch: int, like: Tensor
) -> Tensor | None:
    """Labels or prefix for a model of this configuration, see `TARFlowModel.condition`.

    Args:
        config: of the `TARFlowModel`.
        class_labels: (B,), or None for "no class".
        cond: prefix tokens (B or 1, L, E).
        batch: B.
        like: a tensor of the device of labels that are not given, and of the dtype of one-hot labels.

    Raises:
        ValueError: if the condition is of the wrong kind or shape, or a label is out of range.
    """
    kind, null_label = config.conditioning, config.num_classes
    if kind == "prefix":
        if class_labels is not None:
            raise ValueError("this model is conditioned on a prefix (cond), not on class labels")
        if cond is None:
            raise ValueError("this model needs cond, also for no condition: pass the encoded empty caption")
        if cond.ndim != 3 or cond.shape[2] != config.cond_dim or cond.shape[0] not in (1, batch):
            raise ValueError(f"cond must have the shape ({batch}, L, {config.cond_dim}), got {tuple(cond.shape)}")
        return cond.expand(batch, -1, -1)
    if cond is not None:
        raise ValueError(f"this model has the conditioning {kind!r} and takes no cond")
    if kind == "none":
        if class_labels is not None:
            raise ValueError("this model is unconditional and takes no class_labels")
        return None
    if class_labels is None:
        class_labels = torch.full((batch,), null_label, device=like.device)
    if class_labels.shape != (batch,):
        raise ValueError(f"class_labels must have the shape ({batch},), got {tuple(class_labels.shape)}")
    # On a GPU the check would wait for it; there the data set and the pipeline have checked already. Compilers and
    # exporters take no step that depends on a tensor's values.
    checked = class_labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if checked and batch and not 0 <= class_labels.min() <= class_labels.max() <= null_label:
        raise ValueError(f"class labels must be 0 to {null_label} ({null_label}: none), got {class_labels}")
    if kind == "class_prefix":
        return F.one_hot(class_labels, null_label + 1).to(like.dtype)[:, None]  # (B, 1, classes + 1)
    return class_labels

"""What a caller gives as a condition, in the form that the blocks take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.flows.layers.affine import at_least_float32


class Leveled(NamedTuple):
    """The condition of a model that is trained for many noise levels.

    Attributes:
        given: labels (B,), prefix (B, L, E), or None.
        log_level: the logarithm of each picture's noise level, (B,), at least float32.
    """

    given: Tensor | None
    log_level: Tensor


#: What blocks take: labels (B,), a prefix (B, L, E) or None, with `Leveled` the noise level too.
Condition = Tensor | Leveled | None


def parts_of(condition: Condition) -> tuple[Tensor | None, Tensor | None]:
    """Labels or prefix, and the logarithms of the noise levels (B,), each None if there is none."""
    return (condition.given, condition.log_level) if isinstance(condition, Leveled) else (condition, None)


def with_level(given: Tensor | None, log_level: Tensor | None) -> Condition:
    """The inverse of `parts_of`."""
    return given if log_level is None else Leveled(given, log_level)


def log_levels(config: Any, noise_level: Tensor | float | None, batch: int, like: Tensor) -> Tensor | None:
    """The logarithm of each picture's noise level, (B,), as the blocks take it; None for a model of one level.

    Args:
        config: of the `TARFlowModel`.
        noise_level: t > 0, one for all or (B,) or (B, 1).
        batch: B.
        like: a tensor of the device of levels that are given as a number, and of the model's dtype.

    Raises:
        ValueError: if the model needs a level and has none or one that is not positive, or takes none and has one.
    """
    if not config.get("noise_conditioning", False):
        if noise_level is not None:
            raise ValueError("this model knows the one noise level of its training, and takes no noise_level")
        return None
    if noise_level is None:
        raise ValueError("this model is trained for many noise levels: say by noise_level which its input has")
    if not isinstance(noise_level, Tensor):
        noise_level = torch.as_tensor(noise_level, device=like.device, dtype=at_least_float32(like).dtype)
    if noise_level.numel() not in (1, batch):
        raise ValueError(f"noise_level must be one number or {batch}, got the shape {tuple(noise_level.shape)}")
    # As of labels: on a GPU the check would wait for it.
    checked = noise_level.device.type == "cpu" and not torch.compiler.is_compiling()
    if checked and batch and not bool((noise_level > 0).all() and noise_level.isfinite().all()):
        raise ValueError(f"noise_level must be positive, got {noise_level.flatten().tolist()}")
    return at_least_float32(noise_level).reshape(-1).log().expand(batch)


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

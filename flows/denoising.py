"""Removing the training noise from a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tarflow.flows.layers.affine import at_least_float32
from tarflow.flows.likelihood import prior_log_prob
from tarflow.flows.model import TARFlowModel


def score_denoise(
    model: TARFlowModel,
    y: Tensor,
    noise_std: float,
    class_labels: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """One Tweedie step: y + σ²·∇ log p(y), for a model trained on data with noise of standard deviation σ.

    Args:
        model: a `TARFlowModel`; one with noise_conditioning is asked for its density at the level σ.
        y: noisy samples (B, C, H, W).
        noise_std: σ ≥ 0; 0 returns y.
        class_labels, cond: the condition.

    Returns:
        denoised samples (B, C, H, W), detached.

    Example:
        >>> import torch
        >>> from tarflow import TARFlowModel
        >>> from tarflow.flows.denoising import score_denoise
        >>> flow = TARFlowModel(in_channels=1, sample_size=4, layers_per_block=(1, 1), width=64)
        >>> y = torch.ones(1, 1, 4, 4)
        >>> float(score_denoise(flow, y, noise_std=0.5).mean())  # for a standard normal the score of y is −y
        0.75
    """
    if noise_std < 0:
        raise ValueError(f"noise_std must be 0 or positive, got {noise_std}")
    if noise_std == 0:
        return y
    with torch.inference_mode(False), torch.enable_grad():
        y = at_least_float32(recordable(y.detach())).requires_grad_()
        given = {"class_labels": class_labels, "cond": cond}
        if model.config.get("noise_conditioning", False):
            given["noise_level"] = torch.full((len(y),), noise_std, device=y.device, dtype=y.dtype)
        z, log_det = recordable_call(
            model, y, {name: None if one is None else recordable(one.detach()) for name, one in given.items()}
        )
        # The unit prior here is the published models' choice, also with a learned prior variance.
        (score,) = torch.autograd.grad((prior_log_prob(z) + log_det).sum(), y)
    return (y + noise_std**2 * score).detach()


def recordable(tensor: Tensor) -> Tensor:
    """A tensor that autograd can record: ones that were made in inference mode cannot be."""
    return tensor.clone() if tensor.is_inference() else tensor


def recordable_call(model: nn.Module, y: Tensor, options: dict[str, Any]) -> Any:
    """``model(y, **options)``, also if its weights were made in inference mode: then with copies of them."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    if not any(tensor.is_inference() for tensor in tensors.values()):
        return model(y, **options)
    copies = {name: recordable(tensor.detach()) for name, tensor in tensors.items()}
    return torch.func.functional_call(model, copies, (y,), options)


@torch.no_grad()
def learned_denoise(
    model: TARFlowModel,
    y: Tensor,
    noise_std: float,
    class_labels: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """y − σ·net(y): the same with the score that the model's learned denoiser predicts; one forward pass.

    Args, returns: as of `score_denoise`.

    Raises:
        ValueError: if σ < 0, or the model has no learned denoiser.
    """
    if noise_std < 0:
        raise ValueError(f"noise_std must be 0 or positive, got {noise_std}")
    return at_least_float32(y) - noise_std * model.scaled_score(y, class_labels=class_labels, cond=cond)

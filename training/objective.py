"""What is minimised: the flow's negative log-likelihood of noisy latents, given their condition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tarflow.flows.likelihood import flow_loss, nats_per_dim, prior_log_prob
from tarflow.flows.model import TARFlowModel


class FlowObjective(nn.Module):
    """The flow and, if it is trained along, the text encoder, as one module for the optimizer and Accelerate.

    Args:
        flow: the model.
        text_encoder: a trainable encoder; None if there is none or it is frozen.
    """

    def __init__(self, flow: TARFlowModel, text_encoder: nn.Module | None = None):
        super().__init__()
        self.flow, self.text_encoder = flow, text_encoder

    def forward(
        self,
        latents: Tensor,
        class_labels: Tensor | None = None,
        cond: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        latent_norm_weight: float = 0.0,
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            latents: noisy latents (B, C, H, W).
            class_labels: (B,), dropped ones replaced by the null label.
            cond: encoded captions (B, L, E) of a frozen encoder, or
            input_ids, attention_mask: captions (B, L) for the trained one; dropped ones are the empty caption.
            latent_norm_weight: weight of the penalty relu(mean z² − 1)² per sample.

        Returns:
            ``loss`` (scalar), ``nats_per_dim`` (B,) with the model's own prior, ``z``.
        """
        if input_ids is not None:
            hidden = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            cond = hidden * attention_mask[..., None].to(hidden.dtype)
        z, log_det = self.flow(latents, class_labels=class_labels, cond=cond)
        loss = flow_loss(z, log_det)
        if latent_norm_weight > 0:
            loss = loss + latent_norm_weight * (z.pow(2).mean(dim=(1, 2, 3)) - 1).relu().pow(2).mean()
        log_prob = prior_log_prob(z, self.flow.prior_variance_image()) + log_det
        return {"loss": loss, "nats_per_dim": nats_per_dim(log_prob.detach(), z[0].numel()), "z": z.detach()}


def trained_parameters(objective: nn.Module) -> list[Any]:
    """Parameters that the optimizer changes."""
    return [parameter for parameter in objective.parameters() if parameter.requires_grad]


def step_generator(seed: int, step: int, part: int, process: int, device: torch.device) -> torch.Generator:
    """The generator of everything random in one forward pass; a function of its place only, so resuming is exact."""
    mixed = (seed * 1_000_003 + step) * 1_000_003 + part * 65_537 + process
    return torch.Generator(device=device).manual_seed(mixed % (2**63))

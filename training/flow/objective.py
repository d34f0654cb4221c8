"""What is minimised: the flow's negative log-likelihood of noisy latents, given their condition."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow.flows.adapters.adapters import adapter_layers
from tarflow.flows.likelihood import flow_loss, nats_per_dim, prior_log_prob
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.text.encoding import hidden_states


class FlowObjective(nn.Module):
    """The flow and, if it is trained or sharded along, the text encoder, as one module for the optimizer and Accelerate.

    In evaluation mode everything is computed in the weights' own precision, also where Accelerate casts in training.

    Args:
        flow: the model.
        text_encoder: a trainable or sharded encoder; None if there is none or it stands by itself.
        hidden_layer: which of its hidden states is the condition, see `TextOptions`.
    """

    def __init__(self, flow: TARFlowModel, text_encoder: nn.Module | None = None, hidden_layer: int = -1):
        super().__init__()
        self.flow, self.text_encoder, self.hidden_layer = flow, text_encoder, hidden_layer

    def train(self, mode: bool = True) -> FlowObjective:
        """Set the mode of all parts but a frozen encoder, which has no dropout."""
        super().train(mode)
        if self.text_encoder is not None and not any(weight.requires_grad for weight in self.text_encoder.parameters()):
            self.text_encoder.eval()
        return self

    def forward(
        self,
        latents: Tensor,
        class_labels: Tensor | None = None,
        cond: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        latent_norm_weight: float = 0.0,
        score_target: Tensor | None = None,
        noise_level: Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch: the flow's, or with ``score_target`` the learned denoiser's.

        Args:
            latents: noisy latents (B, C, H, W).
            class_labels: (B,), dropped ones replaced by the null label.
            cond: encoded captions (B, L, E) of a frozen encoder, or
            input_ids, attention_mask: captions (B, L) for the trained one; dropped ones are the empty caption.
            latent_norm_weight: weight of the sum of mean squares of all blocks' outputs but the last's (STARFlow).
            score_target: σ·∇(−log p) at ``latents``, (B, C, H, W), see `score_target`.
            noise_level: of the latents, (B,), for a flow of many levels.
            loss_weights: how much each picture counts, (B,), see `flow_loss`.

        Returns:
            ``loss`` (scalar); of the flow also ``nats_per_dim`` (B,) with the model's own prior, and ``z``.
        """
        device = latents.device.type
        cast = self.training and torch.is_autocast_enabled(device)
        with torch.autocast(device, torch.get_autocast_dtype(device), enabled=cast):
            if input_ids is not None and attention_mask is not None:
                cond = self.encoded(input_ids, attention_mask)
            if score_target is not None:
                cond = None if cond is None else cond.detach()  # the text encoder learns from the flow alone
                predicted = self.flow.scaled_score(latents, class_labels=class_labels, cond=cond)
                return {"loss": F.mse_loss(predicted, score_target)}
            penalised = latent_norm_weight > 0
            z, log_det, *outputs = self.flow(
                latents, class_labels, cond, return_block_outputs=penalised, noise_level=noise_level
            )
            loss = flow_loss(z, log_det, loss_weights)
            if penalised:
                loss = loss + latent_norm_weight * sum(output.pow(2).mean() for output in outputs[0][:-1])
            log_prob = prior_log_prob(z, self.flow.prior_variance_image()) + log_det
            return {"loss": loss, "nats_per_dim": nats_per_dim(log_prob.detach(), z[0].numel()), "z": z.detach()}

    def encoded(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Captions (B, L) as the text encoder has them, (B, L, E), zero behind their ends."""
        return hidden_states(self.text_encoder, input_ids, attention_mask, self.hidden_layer)

    @torch.no_grad()
    def initialize_actnorm(
        self,
        latents: Tensor,
        class_labels: Tensor | None = None,
        cond: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> None:
        """Set the flow's actnorms by a batch of the arguments of `forward`, see `TARFlowModel.initialize_actnorm`."""
        if input_ids is not None and attention_mask is not None:
            cond = self.encoded(input_ids, attention_mask)
        self.flow.initialize_actnorm(latents, class_labels, cond, noise_level)


def score_target(gradient: Tensor, noise_std: float, loss_scale: float) -> Tensor:
    """What the learned denoiser is to give, from the gradient that the flow's backward pass leaves at its input.

    Args:
        gradient: of the batch's mean loss per dimension with respect to the noisy latents (B, C, H, W).
        noise_std: σ of the noise.
        loss_scale: what the loss was multiplied by before the backward pass.

    Returns:
        σ·∇(−log p), of the same shape; its size is about 1 whatever σ.
    """
    return noise_std * gradient.numel() / loss_scale * gradient


def trained_parameters(objective: nn.Module) -> list[nn.Parameter]:
    """Parameters that the optimizer changes."""
    return [parameter for parameter in objective.parameters() if parameter.requires_grad]


def parameter_groups(
    objective: FlowObjective, lr: float, denoiser_lr: float, vae_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups with their peak learning rates: one for the learned denoiser, one for the autoencoder of a
    `JointObjective`, where there are such, and one for everything else."""
    parts = [(getattr(objective.flow, "denoiser", None), denoiser_lr), (getattr(objective, "vae", None), vae_lr)]
    groups = [(list(module.parameters()), rate) for module, rate in parts if module is not None]
    if adapter_layers(objective.flow):  # of which nothing else learns
        groups = [([weight for weight in weights if weight.requires_grad], rate) for weights, rate in groups]
    apart = {id(parameter) for parameters, _ in groups for parameter in parameters}
    others = [parameter for parameter in trained_parameters(objective) if id(parameter) not in apart]
    return [{"params": params, "lr": rate, "peak_lr": rate} for params, rate in [(others, lr), *groups]]

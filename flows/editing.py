"""Editing with an exact flow: paths and variations in z, and filling a hole around tokens that stay.

Shapes: B batch, C, H × W of the latents, T tokens, D numbers of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow.flows.decoding.method import InversionState, check_finite
from tarflow.flows.decoding.sequential import fitting_threads
from tarflow.flows.decoding.step import decode_step
from tarflow.flows.layers.affine import affine_forward, affine_inverse, at_least_float32
from tarflow.flows.layers.block import Block
from tarflow.flows.layers.order import reorder, restore
from tarflow.flows.layers.prepared import at_hand
from tarflow.flows.likelihood import block_affine, check_autoregressive, log_prob, prior_log_prob
from tarflow.flows.model import TARFlowModel

PATHS = ("spherical", "linear")


def interpolate(a: Tensor, b: Tensor, steps: int, path: str = "spherical") -> Tensor:
    """Points from ``a`` to ``b``, ends included, that stay where the prior has its mass.

    A normal z of N numbers has a norm of nearly √N, and the straight line's middle is 0.7 times that: points that the
    flow was never trained on. So "spherical" goes along the great circle between the two directions while the norm
    changes evenly, whatever the angle; "linear" is the straight line divided by √((1 − t)² + t²), which for independent
    a and b is again a draw from the prior. The two differ by how fast they go, and for a and b that are alike.

    Args:
        a, b: standard normal z of one shape, without a batch axis.
        steps: how many points, at least 2.
        path: "spherical" or "linear".

    Returns:
        (steps, …).
    """
    check_path(path, steps)
    if a.shape != b.shape:
        raise ValueError(f"both ends must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).view(-1, *[1] * a.ndim)
    if path == "linear":
        return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2).sqrt()
    norm_a, norm_b = a.norm(), b.norm()
    angle = torch.arccos(((a * b).sum() / (norm_a * norm_b)).clamp(-1, 1))
    if torch.sin(angle) < 1e-6:  # the same direction, or opposite ones, between which there is no one great circle
        return (1 - t) * a + t * b
    direction = (((1 - t) * angle).sin() * (a / norm_a) + (t * angle).sin() * (b / norm_b)) / angle.sin()
    return direction * ((1 - t) * norm_a + t * norm_b)


def resample(z: Tensor, noise: Tensor, strength: float) -> Tensor:
    """z with a part of it drawn anew: √(1 − s²)·z + s·noise, which keeps a standard normal z standard normal.

    Args:
        z, noise: of one shape; noise is standard normal.
        strength: s, from 0 (z itself) to 1 (the noise).
    """
    check_strength(strength)
    return (1 - strength**2) ** 0.5 * z + strength * noise


def check_path(path: str, steps: int) -> None:
    """Whether there is such a path, and so many ``steps`` are enough, see `interpolate`."""
    if path not in PATHS:
        raise ValueError(f"the path must be one of {', '.join(PATHS)}, got {path!r}")
    if steps < 2:
        raise ValueError(f"an interpolation has at least 2 steps, its ends, got {steps}")


def check_strength(strength: float) -> None:
    """Whether a strength of `resample` is one."""
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength must be from 0 to 1, got {strength}")


def check_step_size(step_size: float) -> None:
    """Whether a step of `metropolis` is one."""
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size must be above 0, at most 1, got {step_size}")


class HeldFlow:
    """The flow of a hole's tokens alone, while all others are held at a reference's values in every block.

    Each block is the model's own, but its known tokens are set to the reference's, before and after it. This is an
    autoregressive fill: from noise to data, known tokens are put into the sequence instead of drawn ones. It is
    invertible and has a density, whatever the order of the blocks. It is exact only in part: each token is drawn given
    the known tokens *before* it, not those after it; and with several blocks the known tokens of the inner ones stay the
    reference's, though they should depend on what is in the hole. `metropolis` corrects both.

    Args:
        model: a `TARFlowModel`.
        reference: noisy latents (B, C, H, W): the known tokens, and any content of the hole.
        hole: which tokens are to be made, (B, h, w) booleans over the grid of tokens.
        class_labels, cond, noise_level: as of `TARFlowModel.forward`.

    Raises:
        ValueError: if the hole is of another shape, takes all tokens, or the model's blocks are not autoregressive.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: TARFlowModel,
        reference: Tensor,
        hole: Tensor,
        class_labels: Tensor | None = None,
        cond: Tensor | None = None,
        noise_level: Tensor | float | None = None,
    ):
        tokens, self.grid = model.patchify(at_least_float32(reference))
        if hole.shape != (len(reference), *self.grid) or hole.dtype != torch.bool:
            expected = (len(reference), *self.grid)
            raise ValueError(f"the hole must be booleans of shape {expected}, got {hole.dtype} of {tuple(hole.shape)}")
        if bool(hole.flatten(1).all(1).any()):
            raise ValueError("the hole takes all tokens: there is nothing to fill it from; draw a picture instead")
        self.model, self.class_labels, self.cond, self.noise_level = model, class_labels, cond, noise_level
        self.condition = model.condition(class_labels, cond, len(reference), noise_level)
        self.hole = hole.flatten(1)[..., None]  # (B, T, 1)
        variance = model.held_prior_variance()
        self.prior_std = 1.0 if variance is None else variance.sqrt()  # (T, D)
        self.references = [tokens]  # what goes into each block, and z
        for block in model.blocks:
            check_autoregressive(block)
            self.references.append(block(self.references[-1], self.grid, self.condition)[0])

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise.

        Args:
            x: (B, C, H, W); only the hole's tokens matter.

        Returns:
            noise (B, T, D), standard normal under the held flow, 0 outside the hole; and log|det| (B,) of the hole's
            numbers.
        """
        tokens, _ = self.model.patchify(x)
        log_det: Tensor | float = 0.0
        for block, reference in zip(self.model.blocks, self.references, strict=False):
            tokens = torch.where(self.hole, at_least_float32(tokens), reference)
            shift, log_scale = block_affine(block, tokens, self.grid, self.condition)
            tokens, _ = affine_forward(tokens, shift, log_scale)
            log_det = log_det - (log_scale * self.hole).flatten(1).sum(1)
        return tokens / self.prior_std * self.hole, log_det - self.prior_log_det(tokens)

    @torch.no_grad()
    def inverse(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Noise to data, token after token: the inverse of `forward`, with the same log_det.

        Args:
            noise: (B, T, D); only the hole's tokens matter.

        Returns:
            x (B, C, H, W), with the known tokens of the reference, and log|det| (B,).
        """
        tokens, log_det = noise * self.prior_std, -self.prior_log_det(noise)
        for block, reference in zip(reversed(self.model.blocks), reversed(self.references[:-1]), strict=True):
            tokens, log_scale = self.inverse_block(block, tokens, reference)
            log_det = log_det - (log_scale * self.hole).flatten(1).sum(1)
        return self.model.unpatchify(tokens, self.grid), log_det

    def inverse_block(self, block: Block, z: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """One block, with known tokens from the reference (B, T, D): x and log-scales (B, T, D), row-major."""
        with at_hand(block):
            return self.filled(block, z, reference)

    def filled(self, block: Block, z: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """`inverse_block` with the block's weights at hand."""
        order, grid = block.config.order, self.grid
        run = InversionState(block, len(z), self.grid, self.condition, None, None)
        step = decode_step(block, run.context, run.cache)
        hole, known = (reorder(part, order, grid).unbind(1) for part in (self.hole, reference))
        made: list[Tensor] = []
        log_scales: list[Tensor] = []
        with fitting_threads(len(z), z.device):
            for token, target in enumerate(at_least_float32(reorder(z, order, grid)).unbind(1)):
                if token < run.first:  # without a start token, token 0 passes unchanged
                    shift = log_scale = torch.zeros_like(target)
                else:
                    shift, log_scale = step(run.next_inputs(made, z))
                made.append(torch.where(hole[token], affine_inverse(target, shift, log_scale), known[token]))
                log_scales.append(log_scale)
        x = torch.stack(made, dim=1)
        check_finite(x, "the filling of the hole")
        return restore(x, order, grid), restore(torch.stack(log_scales, dim=1), order, grid)

    def prior_log_det(self, like: Tensor) -> Tensor:
        """Σ log of the prior's standard deviation over the hole's numbers, (B,)."""
        std = torch.as_tensor(self.prior_std, dtype=like.dtype, device=like.device)
        return (std.log() * torch.ones_like(like) * self.hole).flatten(1).sum(1)

    def log_prob(self, noise: Tensor, log_det: Tensor) -> Tensor:
        """log density (B,) with which the held flow draws x, from what `forward` or `inverse` gave."""
        outside = (~self.hole).expand_as(noise).flatten(1).sum(1)  # numbers that are 0, each with the density of 0
        zero = prior_log_prob(torch.zeros_like(noise[:, :1, :1]))
        return prior_log_prob(noise * self.hole) - outside * zero + log_det

    def model_log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of the model itself under the condition, (B,)."""
        return log_prob(self.model, x, self.class_labels, self.cond, self.noise_level)


@dataclass
class Chain:
    """Where a Metropolis–Hastings chain ended.

    Attributes:
        x: (B, C, H, W).
        acceptance: share of accepted proposals, (B,).
        log_prob: log p(x) of the model before each step and after the last, (steps + 1, B).
    """

    x: Tensor
    acceptance: Tensor
    log_prob: Tensor


@torch.no_grad()
def metropolis(
    held: HeldFlow, x: Tensor, draw: Callable[[], tuple[Tensor, Tensor]], steps: int, step_size: float
) -> Chain:
    """A chain over the content of a hole whose stationary distribution is p(hole | known tokens) of the model, exactly.

    A step draws a part of the hole's noise anew (`resample`) and makes tokens of it by the held flow. These proposals
    are reversible with respect to the held flow's own density q, so what is left of the acceptance is
    min(1, p(x')·q(x) / (p(x)·q(x'))), with the model's density p of the whole picture under the condition. The held
    flow's reference stays the same along the chain; the nearer its hole is to what the chain visits, the more is accepted.

    STARFlow (arXiv:2506.06276, appendix D.1) adds noise to the masked part of z = f(x), restores the known part of
    f⁻¹(z'), and accepts with p(x')/p(x), as if the proposals were symmetric. They are in z, but not in x, where p is a
    density: the map between the two has a determinant that depends on the hole, and restoring the known part changes z
    outside it. That chain leads to another distribution; holding known tokens in every block makes the ratio computable.

    Args:
        held: of the model, the hole and the condition.
        x: noisy latents (B, C, H, W) with the reference's known tokens; the chain starts at the hole's content in it.
        draw: for each step, standard normal noise (B, T, D) and uniform numbers (B,).
        steps: how many, 0 or more.
        step_size: of the noise, how much is drawn anew, in (0, 1]; 1 proposes independent fills.
    """
    check_step_size(step_size)
    x = at_least_float32(x)
    noise, log_det = held.forward(x)
    target, proposal = held.model_log_prob(x), held.log_prob(noise, log_det)
    accepted, trace = torch.zeros_like(target), [target]
    for _ in range(steps):
        fresh, uniform = draw()
        new_noise = resample(noise, fresh.to(noise.dtype), step_size) * held.hole
        new_x, log_det = held.inverse(new_noise)
        new_target, new_proposal = held.model_log_prob(new_x), held.log_prob(new_noise, log_det)
        accept = uniform.log() < new_target - target + proposal - new_proposal  # (B,)
        x = torch.where(accept[:, None, None, None], new_x, x)
        noise = torch.where(accept[:, None, None], new_noise, noise)
        target, proposal = torch.where(accept, new_target, target), torch.where(accept, new_proposal, proposal)
        accepted += accept
        trace.append(target)
    return Chain(x, accepted / max(steps, 1), torch.stack(trace))

"""Training a trajectory model: its inputs and its loss.

Shapes: B batch, N states of a trajectory, C channels, H × W size of the latents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tarflow.flows.layers.condition import parts_of
from tarflow.flows.trajectory.chain import chain_entropy, level_of, states_up
from tarflow.flows.trajectory.likelihood import step_log_probs, trajectory_log_prob
from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.training.flow.inputs import InputMaker
from tarflow.training.flow.objective import FlowObjective
from tarflow.training.loop.draws import draw_chances, draw_noise

#: Nats of a number of a standard normal that its square does not have.
CONSTANT = 0.5 * math.log(2 * math.pi)


class TrajectoryInputs(InputMaker):
    """Keyword arguments of `TrajectoryObjective`: chains of noise levels above the noisy latents that a flow would learn.

    Attributes:
        evaluated: steps of the chains of held-out pictures.
    """

    evaluated: int

    @property
    def model(self) -> TrajectoryFlowModel:
        return cast(TrajectoryFlowModel, self.parts.flow)

    def of_steps(self, steps: int) -> TrajectoryInputs:
        """The same, with held-out chains of so many steps."""
        other = copy.copy(self)
        other.evaluated = steps
        return other

    def chain(self, steps: int, like: Tensor | None = None) -> list[float]:
        """The levels of a chain of so many steps, for latents of the size of ``like`` (B, C, H, W), or of training."""
        tokens = None if like is None else like.shape[2] * like.shape[3] // self.model.config.patch_size**2
        return self.model.levels(steps, self.config.train.noise_std, tokens)

    @torch.no_grad()
    def training(self, batch: dict[str, Any], step: int, sample_ids: Sequence[int]) -> dict[str, Any]:
        """A training batch: of each picture one step of a chain, or with ``train.trajectory`` "all" a whole chain; the
        number of its steps is drawn too."""
        inputs = super().training(batch, step, sample_ids)
        del inputs["latent_norm_weight"]
        train, counts = self.config.train, self.model.config.steps
        if train.trajectory == "all":  # of equal length, as they are one batch
            chance = float(draw_chances(train.seed, step, [0], torch.device("cpu"), "chain length")[0])
            rows = [self.chain(counts[int(chance * len(counts))], inputs["latents"])] * len(sample_ids)
            return self.with_chains(inputs, rows, step, sample_ids)
        lengths = draw_chances(train.seed, step, sample_ids, torch.device("cpu"), "chain length").tolist()
        places = draw_chances(train.seed, step, sample_ids, torch.device("cpu"), "chain step").tolist()
        pairs = []
        for length, place in zip(lengths, places, strict=True):
            levels = self.chain(counts[int(length * len(counts))], inputs["latents"])
            first = int(place * (len(levels) - 1))
            pairs.append(levels[first : first + 2])
        return self.with_chains(inputs, pairs, step, sample_ids)

    @torch.no_grad()
    def evaluation(
        self, batch: dict[str, Any], sample_ids: Sequence[int], noise_level: float | None = None
    ) -> dict[str, Any]:
        """Held-out pictures with whole chains that are the same at every call; ``noise_level`` is for flows."""
        inputs = super().evaluation(batch, sample_ids)
        rows = [self.chain(self.evaluated, inputs["latents"])] * len(sample_ids)
        return {**self.with_chains(inputs, rows, -1, sample_ids), "whole": True}

    def with_chains(
        self, inputs: dict[str, Any], rows: list[list[float]], step: int, sample_ids: Sequence[int]
    ) -> dict[str, Any]:
        """``inputs`` with states (B, N, C, H, W) of these levels instead of the noisy latents, and the levels (B, N)."""
        noisy = inputs["latents"]
        levels = torch.tensor(rows, device=noisy.device)
        last = torch.full_like(levels[:, :1], level_of(self.config.train.noise_std))
        shape = (levels.shape[1], *noisy.shape[1:])
        noise = draw_noise(self.config.train.seed, step, sample_ids, shape, self.device, "chain")
        # From the chain's end, where x = (1 − t)·(x₀ + σ·ε), to the lowest of these levels, which may be the end itself.
        states = states_up((1 - last[0, 0]) * noisy, torch.cat([levels, last], dim=1), noise)
        return {**inputs, "latents": states[:, :-1], "levels": levels}


class TrajectoryObjective(FlowObjective):
    """The model and, if it is trained along, the text encoder; see `FlowObjective`."""

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        levels: Tensor,
        class_labels: Tensor | None = None,
        cond: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        whole: bool = False,
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            latents: states of chains (B, N, C, H, W), in the order of ``levels`` (B, N).
            class_labels, cond, input_ids, attention_mask: as of `FlowObjective`.
            whole: chains begin at 1, and the likelihood asked for is that of the whole chain.

        Returns:
            ``loss`` (scalar), which lacks the constant ½·log 2π; ``nats_per_dim`` (B,), of the steps' mean or, if
            ``whole``, of the chain; and ``z``, which is ``latents``.
        """
        model, device = cast(TrajectoryFlowModel, self.flow), latents.device.type
        cast_down = self.training and torch.is_autocast_enabled(device)
        with torch.autocast(device, torch.get_autocast_dtype(device), enabled=cast_down):
            if input_ids is not None and attention_mask is not None:
                cond = self.encoded(input_ids, attention_mask)
            condition, _ = parts_of(model.condition(class_labels, cond, len(latents)))
            if whole:
                nats = -trajectory_log_prob(model, latents, levels, condition) / latents[0].numel()
            else:
                nats = -step_log_probs(model, latents, levels, condition).mean(1) / latents[0, 0].numel()
        return {"loss": nats.mean() - CONSTANT, "nats_per_dim": nats.detach(), "z": latents.detach()}


def trajectory_metrics(nats: float, levels: Sequence[float], noise_std: float) -> tuple[float, float]:
    """Nats per number of the whole chain (N·C·H·W of them), and a bound from above on what a flow would report of the
    noisy latents x₀ + σ·ε: the chain's nats less its entropy given its end, by Jensen's inequality.

    Args:
        nats: mean −log p of held-out chains, per number of the chain.
        levels: of the chain.
        noise_std: σ.
    """
    return nats, nats * len(levels) - chain_entropy(levels) + math.log1p(noise_std)

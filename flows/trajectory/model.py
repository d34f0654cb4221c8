"""TrajectoryFlowModel: a short chain from noise to data, each step of it drawn for all tokens at once.

The method is that of *Normalizing Trajectory Models* (arXiv 2605.08078). A shallow invertible *transporter* f maps each
state x_t of the chain to u_t = f(x_t); a deep *predictor* with full attention says what u_s is given u_t, as a Gaussian of
each number. So p(x_s | x_t) = N(f(x_s); μ, σ²)·|det ∂f/∂x_s| is a flow of its own, and the likelihood of a chain is exact.
To draw, the predictor passes once for each step, and the transporter is inverted once, at the end.

Shapes: B batch, C channels, H × W size of the latents, p patch size, T = H/p · W/p tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from tarflow.flows.blocks.autoregressive import FlowBlock
from tarflow.flows.build import check_model, network_config
from tarflow.flows.habits import NetworkHabits
from tarflow.flows.layers.block import Block
from tarflow.flows.layers.condition import Condition, log_levels, with_level
from tarflow.flows.layers.module_list import ModuleList
from tarflow.flows.layers.network import TokenNetwork
from tarflow.flows.layers.order import block_order
from tarflow.flows.token_model import TokenModel
from tarflow.flows.trajectory.chain import chain_levels, default_shift, level_of
from tarflow.flows.trajectory.predictor import Predictor

#: Settings of a `TARFlowModel` that a transporter has no choice of.
FIXED: dict[str, Any] = {
    "block": "autoregressive",
    "condition_blocks": "deep",
    "learned_prior": False,
    "learned_denoiser": "none",
    "groups": "checkerboard",
    "mixing": "none",
    "actnorm": False,
    "noise_conditioning": False,
    "deep_order": None,
}


class TrajectoryFlowModel(TokenModel, NetworkHabits, ModelMixin, ConfigMixin):
    """Transporter and predictor. Its ``forward`` is the transporter; see `step_log_prob`, `trajectory_log_prob` and
    `generate_trajectory` for what is made of the two.

    Args:
        layers_per_block: Transformer layers of the transporter's blocks, from the data on, and last of the predictor.
        width: of the transporter; ``deep_width`` (None: the same) is that of the predictor.
        conditioning, num_classes, cond_dim: of the predictor; the transporter sees no condition.
        transporter_levels: every block of the transporter gets an embedding of the logarithm of its state's level, as the
            blocks of a `TARFlowModel` with ``noise_conditioning``.
        steps: numbers of steps of the chains that it is trained for; the first one is what a call takes by default.
        shift: see `chain_levels`; None takes `default_shift`.
        others: as of a `TARFlowModel`.

    Raises:
        ValueError: for settings that do not fit together.

    Example:
        >>> import torch
        >>> from tarflow import TrajectoryFlowModel
        >>> model = TrajectoryFlowModel(in_channels=1, sample_size=4, layers_per_block=(1, 1, 1), width=64)
        >>> x = torch.randn(2, 1, 4, 4)
        >>> u, log_det = model(x)  # data to what the predictor works on
        >>> u.shape, log_det.shape
        (torch.Size([2, 1, 4, 4]), torch.Size([2]))
    """

    _group_offload_block_modules = ["predictor"]  # noqa: RUF012 (the library's interface)
    _skip_layerwise_casting_patterns = ["proj_in", "proj_out", "proj_cond", "embed_levels", "level_embed"]  # noqa: RUF012 (the library's interface)
    _repeated_blocks = ["TransformerLayer"]  # noqa: RUF012 (what `compile_repeated_blocks` compiles)
    _no_split_modules = ["FlowBlock", "Predictor", "TransformerLayer"]  # noqa: RUF012
    _on_one_accelerator = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        sample_size: int = 8,
        patch_size: int = 1,
        patch_layout: str = "channel_last",
        layers_per_block: tuple[int, ...] = (1, 1, 4),
        width: int = 192,
        deep_width: int | None = None,
        head_dim: int = 64,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        mlp: str = "gelu",
        mlp_ratio: int = 4,
        norm: str = "layer_norm",
        final_norm: bool = True,
        qk_norm: bool = False,
        post_norm: bool = False,
        bias: bool = True,
        start_token: bool = True,
        scale: str = "softplus",
        soft_clip: float = 4.0,
        positions: str = "rotary",
        position_length: int | None = None,
        conditioning: str = "none",
        num_classes: int = 0,
        cond_dim: int = 0,
        first_order: str = "reversed",
        steps: tuple[int, ...] = (4, 8, 16),
        shift: float | None = None,
        transporter_levels: bool = False,
    ):
        super().__init__()
        settings = SimpleNamespace(**{**FIXED, **self.config})
        check_model(settings)
        check_trajectory(settings)
        *transporter, deep = layers_per_block
        self.blocks: ModuleList[Block] = ModuleList()
        for index, layers in enumerate(transporter):
            config = network_config(settings, layers, width, False, block_order(index, first_order))
            self.blocks.append(FlowBlock(replace(config, noise_conditioning=transporter_levels)))
        config = network_config(settings, deep, deep_width or width, True, "row_major")
        self.predictor = Predictor(replace(config, transformer=replace(config.transformer, causal=False)))
        self.checkpoint_blocks = self.reversible = False

    @property
    def networks(self) -> list[TokenNetwork]:
        """The transporter's blocks and the predictor."""
        return [*self.blocks, self.predictor]

    @property
    def reads_condition(self) -> TokenNetwork:
        return self.predictor

    def forward(self, x: Tensor, noise_level: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        """u = f(x) (B, C, H, W) of states x (B, C, H, W) and log|det du/dx| (B,); ``noise_level`` as of `at_level`."""
        tokens, grid = self.patchify(x)
        u, log_det, _ = self.run_blocks(tokens, grid, self.at_level(noise_level, len(x)))
        return self.unpatchify(u, grid), log_det

    def at_level(self, noise_level: Tensor | float | None, batch: int) -> Condition:
        """What the transporter's blocks take as their condition.

        Args:
            noise_level: t > 0 of the states, one for all or (B,); not used without ``transporter_levels``.
            batch: B.

        Raises:
            ValueError: if it is needed and missing, or not positive.
        """
        if not self.config.transporter_levels:
            return None
        return with_level(None, log_levels({"noise_conditioning": True}, noise_level, batch, self.like()))

    def predict(
        self, u: Tensor, level: Tensor, lower: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of u_s given u_t, (B, C, H, W) each.

        Args:
            u: u_t (B, C, H, W).
            level, lower: t and s (B,).
            condition: of `condition`.
        """
        tokens, grid = self.patchify(u)
        mean, log_std = self.predictor(tokens, grid, level, lower, condition)
        return self.unpatchify(mean, grid), self.unpatchify(log_std, grid)

    def levels(self, steps: int, noise_std: float, tokens: int | None = None) -> list[float]:
        """The levels of a chain that ends at x₀ + σ·ε, see `chain_levels`.

        Args:
            steps: one of the model's.
            noise_std: σ.
            tokens: of a picture; those of training if not given.

        Raises:
            ValueError: for a number of steps that the model was not trained with.
        """
        if steps not in self.config.steps:
            known = ", ".join(str(one) for one in self.config.steps)
            raise ValueError(f"this trajectory model was trained with {known} steps, and cannot draw in {steps}")
        count = tokens or (self.config.sample_size // self.config.patch_size) ** 2
        shift = default_shift(count) if self.config.shift is None else self.config.shift
        return chain_levels(steps, level_of(noise_std), shift)

    def scale_noise(self, noise: Tensor) -> Tensor:
        """Standard normal noise is a draw of the chain's first state already."""
        return noise

    def held_prior_variance(self) -> None:
        """None: the first state is standard normal."""


def check_trajectory(settings: Any) -> None:
    """Errors of a `TrajectoryFlowModel`'s arguments that a `TARFlowModel` does not have."""
    layers, steps = settings.layers_per_block, settings.steps
    if len(layers) < 2 or min(layers) < 1:
        raise ValueError(
            "layers_per_block of a trajectory model lists the transporter's blocks and then the predictor, with at least "
            f"1 layer each, got {list(layers)}"
        )
    if settings.scale == "additive":
        raise ValueError(
            "a trajectory model predicts standard deviations: take scale 'softplus' or 'exp', not 'additive'"
        )
    whole = all(isinstance(one, int) and not isinstance(one, bool) and one >= 1 for one in steps)
    if not steps or not whole or len(set(steps)) != len(steps):
        raise ValueError(f"steps must list different whole numbers of at least 1, got {list(steps)}")
    if settings.shift is not None and not 0 < settings.shift < math.inf:
        raise ValueError(f"shift must be positive and finite, got {settings.shift}")

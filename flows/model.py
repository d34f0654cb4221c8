"""TARFlowModel: the whole flow. TARFlow, STARFlow and their ancestors are configurations of it.

Shapes: B batch, C channels, H × W size of the latents, p patch size, T = H/p · W/p tokens.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from tarflow.flows.adapters.adapters import FlowAdapters
from tarflow.flows.blocks.coupling import CouplingBlock
from tarflow.flows.blocks.reversible import through_blocks
from tarflow.flows.build import check_model, make_blocks, make_denoiser
from tarflow.flows.decoding import sampling
from tarflow.flows.habits import FlowOutput, NetworkHabits
from tarflow.flows.layers.condition import as_condition
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.network import TokenNetwork
from tarflow.flows.layers.prepared import at_hand
from tarflow.flows.token_model import TokenModel


class TARFlowModel(FlowAdapters, TokenModel, NetworkHabits, ModelMixin, ConfigMixin):
    """Flow blocks, listed from the data to the noise.

    Args:
        in_channels: C.
        sample_size: H = W that the model is trained on; with rotary positions other sizes work at call time.
        patch_size: p.
        patch_layout: order of the numbers in a token: "channel_first" (TARFlow) or "channel_last" (STARFlow).
        layers_per_block: Transformer layers of each block, the last one next to the noise; 0 leaves a block out, but
            its place still counts for the orders.
        width: of the Transformers; ``deep_width`` (None: the same) is that of the last block.
        head_dim: size of a head; ``num_heads`` (None: width / head_dim), ``num_kv_heads`` (None: num_heads).
        mlp: "gelu" or "geglu"; ``mlp_ratio`` is its expansion.
        norm: "layer_norm" or "rms_norm", before attention and MLP; ``post_norm`` after them, ``final_norm`` before the
            output and ``qk_norm`` are RMSNorm with either; ``bias`` of attention and MLP.
        start_token: a learned input before token 0, which is then transformed too; else outputs are shifted by one.
            In coupling blocks it stands in the places that are not seen; else zeros do.
        scale: "exp", "softplus" or "additive" (volume preserving).
        soft_clip: bound s·tanh(·/s) of the affine parameters; 0 is off.
        positions: "learned", "rotary" or "rotary_1d"; ``position_length`` (None: the grid's side) scales rotary ones.
        conditioning: "none"; "class_vectors" (added to every token); "class_prefix" (one token before the image's);
            "prefix" (a sequence of tokens of size ``cond_dim``, for example an encoded caption).
        condition_blocks: which blocks see it, "all" or "deep" (the last one).
        num_classes: for the class conditionings; the label num_classes means "no class".
        noise_conditioning: one flow for many levels of the training noise, which all calls then need as ``noise_level``:
            every block gets an embedding of its logarithm (iTARFlow).
        first_order: order of block 0, "row_major" or "reversed"; they alternate.
        deep_order: of the last block, "coarse_to_fine" or "outward" instead, see `tarflow.flows.layers.scattered`: it is
            then drawn in fewer sweeps. It has learned positions besides others, so samples are of the trained size.
        learned_prior: keep a running prior variance per number (see `update_prior`).
        learned_denoiser: also a network that predicts the score, "none", "unconditional" or "conditional" (it sees the
            condition); of ``denoiser_layers`` layers of the shallow blocks' width.
        block: "autoregressive" (TARFlow, STARFlow), "coupling" (NICE, RealNVP, Glow: one group of tokens is changed by
            what is seen of the other, in one pass in both directions) or "inverse_autoregressive" (IAF: drawing is one
            pass, likelihood goes token after token).
        groups: of coupling blocks, "checkerboard" or "halves"; which one is seen alternates as the orders do.
        mixing: before each coupling block "lu", a learned invertible matrix over a token's numbers, or "none";
            ``actnorm`` a learned shift and scale of each before that, see `initialize_actnorm`.

    Raises:
        ValueError: for settings that do not fit together.

    Example:
        >>> import torch
        >>> from tarflow import TARFlowModel
        >>> flow = TARFlowModel(
        ...     in_channels=4, layers_per_block=(1, 2), width=64, conditioning="class_vectors", num_classes=10
        ... )
        >>> x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
        >>> z, log_det = flow(x, class_labels=labels)  # data to noise
        >>> z.shape, log_det.shape
        (torch.Size([2, 4, 8, 8]), torch.Size([2]))
        >>> again, _ = flow.inverse(z, class_labels=labels)  # noise to data
        >>> torch.allclose(again, x, atol=1e-4)
        True
    """

    _group_offload_block_modules = ["denoiser"]  # noqa: RUF012 (the library's interface)
    _skip_layerwise_casting_patterns = ["proj_in", "proj_out", "proj_cond", "level_embed"]  # noqa: RUF012 (too small to be worth it)
    _repeated_blocks = ["TransformerLayer"]  # noqa: RUF012 (what `compile_repeated_blocks` compiles)
    _on_one_accelerator = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        sample_size: int = 8,
        patch_size: int = 1,
        patch_layout: str = "channel_last",
        layers_per_block: tuple[int, ...] = (1, 1, 1, 4),
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
        condition_blocks: str = "all",
        num_classes: int = 0,
        cond_dim: int = 0,
        first_order: str = "reversed",
        learned_prior: bool = False,
        learned_denoiser: str = "none",
        denoiser_layers: int = 8,
        block: str = "autoregressive",
        groups: str = "checkerboard",
        mixing: str = "none",
        actnorm: bool = False,
        noise_conditioning: bool = False,
        deep_order: str | None = None,
    ):
        super().__init__()
        check_model(self.config)
        self.blocks = make_blocks(self.config)
        self.denoiser = make_denoiser(self.config)
        self.prior_variance: Tensor | None
        numbers = (sample_size // patch_size) ** 2, in_channels * patch_size**2
        self.register_buffer("prior_variance", torch.ones(numbers) if learned_prior else None)
        self.checkpoint_blocks = self.reversible = False
        # Blocks have parameters of their own, so a block is the smallest part that `device_map` may put elsewhere.
        self._no_split_modules = [*sorted({type(network).__name__ for network in self.networks}), "TransformerLayer"]

    @property
    def networks(self) -> list[TokenNetwork]:
        """The blocks, and the learned denoiser."""
        return [*self.blocks, *([] if self.denoiser is None else [self.denoiser])]

    def forward(
        self,
        x: Tensor,
        class_labels: Tensor | None = None,
        cond: Tensor | None = None,
        return_block_outputs: bool = False,
        return_dict: bool = False,
        noise_level: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, list[Tensor]] | FlowOutput:
        """Data to noise.

        Args:
            x: noisy latents or pixels (B, C, H, W).
            class_labels: (B,) for the class conditionings; None is "no class" for all.
            cond: prefix tokens (B, L, E) for the conditioning "prefix".
            return_block_outputs: also return each block's output.
            return_dict: return a `FlowOutput` instead of a tuple.
            noise_level: standard deviation t > 0 of the noise in x, one for all or (B,); for noise_conditioning alone.

        Returns:
            z (B, C, H, W) and log|det dz/dx| (B,), summed over a sample; with ``return_block_outputs`` also a list of
            (B, C, H, W). At least float32.
        """
        condition = self.condition(class_labels, cond, x.shape[0], noise_level)
        tokens, grid = self.patchify(x)
        if self.reversible and torch.is_grad_enabled():
            if return_block_outputs:
                raise ValueError("checkpointing 'reversible' keeps no blocks' outputs: take another, or leave them out")
            tokens, log_det = through_blocks(self.blocks, tokens, grid, condition)
            z = self.unpatchify(tokens, grid)
            return FlowOutput(z, log_det) if return_dict else (z, log_det)
        tokens, log_det, outputs = self.run_blocks(tokens, grid, condition, return_block_outputs)
        z = self.unpatchify(tokens, grid)
        made = [self.unpatchify(output, grid) for output in outputs] if return_block_outputs else None
        if return_dict:
            return FlowOutput(z, log_det, made)
        return (z, log_det) if made is None else (z, log_det, made)

    def inverse(
        self,
        z: Tensor,
        class_labels: Tensor | None = None,
        cond: Tensor | None = None,
        null_cond: Tensor | None = None,
        guidance: Guidance | None = None,
        noise_level: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Noise to data, sequentially, or in one pass where the blocks are inverted so.

        Args:
            z: (B, C, H, W).
            class_labels, cond, noise_level: as in `forward`.
            null_cond: prefix tokens that mean "no condition" (the empty caption), (B or 1, L, E); needed for guidance
                with the conditioning "prefix".
            guidance: see `Guidance`.

        Returns:
            x (B, C, H, W) and the log|det dz/dx| (B,) of the (guided) map at x.
        """
        condition = self.condition(class_labels, cond, z.shape[0], noise_level)
        null = None
        if guidance is not None and guidance.active:
            null = self.condition(None, null_cond, z.shape[0], noise_level)
        return sampling.generate(self, z, condition, null, guidance)

    @torch.no_grad()
    def initialize_actnorm(
        self,
        x: Tensor,
        class_labels: Tensor | None = None,
        cond: Tensor | None = None,
        noise_level: Tensor | float | None = None,
    ) -> None:
        """Set each actnorm so that the numbers that come to it from a batch have mean 0 and deviation 1. Without this
        they start as the identity.

        Args:
            x, class_labels, cond, noise_level: as in `forward`; some hundred samples.
        """
        condition = self.condition(class_labels, cond, x.shape[0], noise_level)
        tokens, grid = self.patchify(x)
        for block in self.blocks if self.config.actnorm else ():
            if isinstance(block, CouplingBlock) and block.actnorm is not None:
                block.actnorm.initialize(tokens)
            tokens, _ = block(tokens, grid, condition)

    def scaled_score(self, y: Tensor, class_labels: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """σ·∇(−log p(y)) as the learned denoiser predicts it, (B, C, H, W), at least float32.

        Args:
            y: noisy samples (B, C, H, W); class_labels, cond: as in `forward`.

        Raises:
            ValueError: if the model has no learned denoiser.
        """
        if self.denoiser is None:
            raise ValueError("this model has no learned denoiser (learned_denoiser is 'none'); use the score step")
        condition = as_condition(self.config, class_labels, cond, y.shape[0], self.like())
        tokens, grid = self.patchify(y)
        return self.unpatchify(self.denoiser(tokens, grid, condition), grid)

    def held_prior_variance(self) -> Tensor | None:
        """A copy of the learned prior variance (T, C·p·p) on the device that computes, or None for the unit prior."""
        if self.prior_variance is None:
            return None
        with at_hand(self):
            return self.prior_variance.clone()

    def prior_variance_image(self) -> Tensor | None:
        """The learned prior variance in image layout (C, H, W), or None for the unit prior."""
        variance, side = self.held_prior_variance(), self.config.sample_size // self.config.patch_size
        return None if variance is None else self.unpatchify(variance[None], (side, side))[0]

    @torch.no_grad()
    def update_prior(self, z: Tensor) -> None:
        """variance ← 0.9·variance + 0.1·(batch mean of z²), from a training batch's z (B, C, H, W)."""
        if self.prior_variance is not None:
            tokens, _ = self.patchify(z)
            self.prior_variance.lerp_(tokens.pow(2).mean(0).to(self.prior_variance.dtype), 0.1)

    def check_prior_size(self, samples: Tensor) -> None:
        """An error for samples or noise (B, C, H, W) of another size than that of a learned prior."""
        side = self.config.sample_size
        wanted = (self.config.in_channels, side, side)
        if self.prior_variance is not None and tuple(samples.shape[1:]) != wanted:
            raise ValueError(f"this model has learned its prior for samples {wanted}, got {tuple(samples.shape[1:])}")

    def scale_noise(self, noise: Tensor) -> Tensor:
        """Standard normal noise (B, C, H, W) as a draw from the prior."""
        self.check_prior_size(noise)
        variance = self.prior_variance_image()
        return noise if variance is None else noise * variance.sqrt().to(noise.dtype)

"""What all models of flow blocks have: pictures as tokens, conditions, the way through the blocks, activations to be
computed again.

Shapes: B batch, C channels, H × W size of the latents, p patch size, T tokens, L prefix tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tarflow.flows.layers.block import Block
from tarflow.flows.layers.condition import Condition, as_condition, log_levels, with_level
from tarflow.flows.layers.module_list import ModuleList
from tarflow.flows.layers.network import TokenNetwork, recomputed
from tarflow.flows.layers.order import patchify, unpatchify
from tarflow.flows.layers.prepared import compute_device, compute_dtype, weights_move

if TYPE_CHECKING:
    from diffusers import ModelMixin as Model
else:
    Model = object

#: What `set_checkpointing` takes.
CHECKPOINTED = ("none", "block", "layer", "both", "reversible")


class TokenModel(Model):
    """Goes before `NetworkHabits` among a model's bases.

    Attributes:
        blocks: flow blocks from the data to the noise.
        checkpoint_blocks: of each block only the input is kept for the backward pass.
        reversible: of coupling blocks not even that.
    """

    blocks: ModuleList[Block]
    checkpoint_blocks: bool
    reversible: bool

    @property
    def networks(self) -> list[TokenNetwork]:
        """The blocks, and networks beside them."""
        raise NotImplementedError(f"{type(self).__name__} lacks `networks`")

    @property
    def reads_condition(self) -> TokenNetwork:
        """The network next to the noise, which always sees the condition."""
        return self.blocks[-1]

    def set_checkpointing(self, unit: str, every: int = 1) -> None:
        """Which activations the backward pass computes again instead of keeping them, to save memory.

        Args:
            unit: "none"; "block", of which only the input tokens stay, (B, T, C) for each block; "layer", of which only
                the input (B, T, D) stays (of "inverse_autoregressive" blocks as "block"); "both", layers while a block
                is computed again; "reversible", for coupling blocks, nothing but the last output: inputs are rebuilt
                from it.
            every: with "layer" and "both", of every so many layers only; of the others all activations stay.

        Raises:
            ValueError: for another unit, "reversible" with blocks of another kind, or ``every`` below 1.
        """
        if unit not in CHECKPOINTED:
            raise ValueError(f"checkpointing must be one of {', '.join(CHECKPOINTED)}, got {unit!r}")
        if every < 1:
            raise ValueError(f"checkpointing needs a layer distance of at least 1, got {every}")
        kind = self.config.get("block", "autoregressive")
        if unit == "reversible" and kind != "coupling":
            raise ValueError(f"checkpointing 'reversible' is for block 'coupling', not {kind!r}")
        self.checkpoint_blocks, self.reversible = unit in ("block", "both"), unit == "reversible"
        for network in self.networks:
            network.checkpoint_every = every if unit in ("layer", "both") else 0
            network._gradient_checkpointing_func = recomputed

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes any activations again."""
        return self.checkpoint_blocks or self.reversible or super().is_gradient_checkpointing

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass, also where `set_checkpointing` said otherwise."""
        self.set_checkpointing("none")

    @property
    def arguments(self) -> dict[str, Any]:
        """What the constructor was called with, defaults included."""
        return {key: value for key, value in self.config.items() if not key.startswith("_")}

    @property
    def null_label(self) -> int:
        """The class label that means "no class"."""
        return self.config.num_classes

    def run_blocks(
        self, tokens: Tensor, grid: tuple[int, int], condition: Condition, keep: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Tokens (B, T, C·p·p) through all blocks, with their log|det| (B,) and, if ``keep``, each block's output."""
        log_dets: list[Tensor] = []
        outputs: list[Tensor] = []
        for block in self.blocks:
            again = self.checkpoint_blocks or (block.caches_with_gradients and block.gradient_checkpointing)
            if torch.is_grad_enabled() and (again or weights_move(block)):
                tokens, block_log_det = recomputed(block, tokens, grid, condition)
            else:
                tokens, block_log_det = block(tokens, grid, condition)
            log_dets.append(block_log_det)
            if keep:
                outputs.append(tokens)
        return tokens, sum(log_dets[1:], log_dets[0]), outputs

    def condition(
        self,
        class_labels: Tensor | None,
        cond: Tensor | None,
        batch: int,
        noise_level: Tensor | float | None = None,
    ) -> Condition:
        """Labels or prefix, and the noise level, as the blocks take them: see `Condition`.

        Args:
            class_labels, cond, noise_level: as of ``forward``.
            batch: B.

        Raises:
            ValueError: if the condition is of the wrong kind or shape, a label is out of range, or a noise level is
                missing, not positive, or given to a model of one level.
        """
        like = self.like()
        given = as_condition(self.config, class_labels, cond, batch, like)
        return with_level(given, log_levels(self.config, noise_level, batch, like))

    def like(self) -> Tensor:
        """An empty tensor of the device and dtype that the model computes in."""
        last = self.reads_condition
        return torch.empty(0, device=compute_device(last.proj_in, last), dtype=compute_dtype(last.proj_in))

    def patchify(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) → row-major tokens (B, T, C·p·p) and the grid (H/p, W/p).

        Raises:
            ValueError: if the channels are not the model's, or H or W is no multiple of the patch size.
        """
        p = self.config.patch_size
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"expected (B, {self.config.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"height and width must be multiples of the patch size {p}, got {tuple(x.shape[2:])}")
        return patchify(x, p, self.config.patch_layout), (x.shape[2] // p, x.shape[3] // p)

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, T, C·p·p) → (B, C, H, W)."""
        return unpatchify(tokens, self.config.patch_size, self.config.patch_layout, grid)

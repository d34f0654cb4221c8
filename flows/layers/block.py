"""What decoding and densities know of a flow and its blocks, whatever their kind.

Shapes: B batch, C channels of a token, S slots of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tarflow.flows.layers.affine import log_scale_of, soft_clip
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.config import BlockConfig
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.kv_cache import Cache
from tarflow.flows.layers.module_list import ModuleList
from tarflow.flows.layers.network import BlockContext, TokenNetwork
from tarflow.flows.layers.order import held_places
from tarflow.flows.layers.scattered import SCATTERED


class Block(TokenNetwork):
    """A network that gives shifts and log-scales of tokens; the kinds of blocks say of which, and map both ways.

    Args:
        config: what the block is made of.
    """

    #: Whether `inverse` is one parallel pass; else it makes token after token.
    one_pass = False
    #: Whether `forward` writes to a cache, so that its layers' activations can only be computed again all together.
    caches_with_gradients = False

    def __init__(self, config: BlockConfig):
        # [raw scale; shift]; zeros, so an untrained block is the identity
        super().__init__(config, outputs=config.token_dim * (1 if config.scale == "additive" else 2))
        self.start_token = nn.Parameter(torch.randn(config.token_dim) * 0.02) if config.start_token else None

    def inverse(
        self,
        z: Tensor,
        grid: tuple[int, int],
        cond: Condition = None,
        null_cond: Condition = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Noise to data (B, T, C), and the log|det| (B,) of `forward`; see the kinds of blocks."""
        raise NotImplementedError(f"{type(self).__name__} lacks `inverse`")

    def slot_inputs(self, x: Tensor, grid: tuple[int, int], start: int, end: int) -> Tensor:
        """What the slots hold that give the parameters of tokens start … end − 1: the token before each, or in a
        scattered order what `held_tokens` says.

        Args:
            x: all tokens in the block's order, (B, T, C).
            grid: rows and columns of tokens.

        Returns:
            (B, end − start, C), in a scattered order H·C. Without a start token, token 0 has no slot.
        """
        order = self.config.order
        if start > 0 and order not in SCATTERED:
            return x[:, start - 1 : end - 1]
        assert self.start_token is not None  # where token 0 is made, and in scattered orders
        first = self.start_token.to(x.device, x.dtype).expand(len(x), 1, -1)
        if order in SCATTERED:
            return torch.cat([x, first], dim=1)[:, held_places(order, grid, x.device)[start:end]].flatten(2)
        return torch.cat([first, x[:, : end - 1]], dim=1)

    def affine_parameters(
        self,
        inputs: Tensor,
        first_slot: int,
        context: BlockContext,
        cache: Cache | None = None,
        temperature: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Shift and log-scale (B, S, C) from the tokens in a run of slots, in the block's order; see `run`."""
        out = soft_clip(self.run(inputs, first_slot, context, cache, temperature), self.config.soft_clip)
        if self.config.scale == "additive":
            return out, torch.zeros_like(out)
        raw, shift = out.chunk(2, dim=-1)
        return shift, log_scale_of(raw, self.config.scale)


class Flow(Protocol):
    """What decoding needs of a `TARFlowModel`."""

    @property
    def config(self) -> Any:
        """The model's settings, by name."""

    @property
    def blocks(self) -> ModuleList[Block]:
        """From the data to the noise."""

    def modules(self) -> Iterator[nn.Module]:
        """All parts, itself included."""

    def patchify(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) as row-major tokens, and their grid."""

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The inverse of `patchify`."""

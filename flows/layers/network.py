"""The causal or full Transformer over the tokens of one image, with its positions and conditions.

Shapes: B batch, C channels of a token, S slots of a sequence, T tokens of an image, L prefix tokens, D width.
A *slot* is a place in the sequence that the Transformer reads; a prefix comes before the image's slots.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from tarflow.flows.layers.affine import at_least_float32
from tarflow.flows.layers.condition import Condition, parts_of
from tarflow.flows.layers.config import BlockConfig
from tarflow.flows.layers.kv_cache import Cache, KVCache
from tarflow.flows.layers.level import LevelEmbedding
from tarflow.flows.layers.module_list import ModuleList
from tarflow.flows.layers.order import reorder
from tarflow.flows.layers.positions import Rotation, rotary_angles, rotary_angles_1d, rotation_tables, slots_of
from tarflow.flows.layers.prepared import called_with_group, compute_device, compute_dtype, weights_move
from tarflow.flows.layers.scattered import HELD
from tarflow.flows.layers.transformer import OutputLinear, RMSNorm, TransformerLayer


@dataclass(frozen=True)
class BlockContext:
    """What stays the same over all slots of one sequence.

    Attributes:
        prefix: projected condition tokens (B, L, D), or None.
        added: what is added to every slot's embedding: positions, class vectors, the noise level's vector, (B or 1, S, D),
            or None.
        rotation: tables of the L + T slots, see `rotation_tables`, or None.
    """

    prefix: Tensor | None
    added: Tensor | None
    rotation: Rotation | None

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else self.prefix.shape[1]

    def select(self, rows: Tensor) -> BlockContext:
        """The context of some of the B rows."""

        def rows_of(part: Tensor | None) -> Tensor | None:
            return part if part is None or part.shape[0] == 1 else part[rows]

        return BlockContext(rows_of(self.prefix), rows_of(self.added), self.rotation)


class TokenNetwork(nn.Module):
    """Tokens in, numbers for each token out: embedding, positions, condition, Transformer layers, output layer.

    Args:
        config: what the network is made of.
        outputs: how many numbers each slot gives.
    """

    def __init__(self, config: BlockConfig, outputs: int):
        super().__init__()
        self.config = config
        transformer = config.transformer
        self.proj_in = nn.Linear(HELD.get(config.order, 1) * config.token_dim, transformer.width)
        self.layers: ModuleList[TransformerLayer] = ModuleList(
            TransformerLayer(transformer) for _ in range(transformer.layers)
        )
        self.final_norm = RMSNorm(transformer.width) if config.final_norm else None
        self.proj_out = OutputLinear(transformer.width, outputs)
        self.pos_embed = None
        if config.positions == "learned" or config.order in HELD:  # whose steps from token to token differ
            self.pos_embed = nn.Parameter(torch.randn(config.grid_size**2, transformer.width) * 0.01)
        self.class_embed = self.proj_cond = None
        if config.conditioning == "class_vectors":
            self.class_embed = nn.Parameter(torch.randn(config.num_classes, transformer.width) * 0.01)
        elif config.conditioning != "none":
            self.proj_cond = nn.Linear(config.cond_dim, transformer.width)
        self.level_embed = LevelEmbedding(transformer.width) if config.noise_conditioning else None
        #: Every so many layers' activations are computed again in the backward pass instead of kept; 0 keeps all.
        self.checkpoint_every = 0
        self._gradient_checkpointing_func = recomputed
        nn.init.zeros_(self.proj_out.weight)  # an untrained network gives zeros
        nn.init.zeros_(self.proj_out.bias)

    @property
    def sees_condition(self) -> bool:
        return self.config.conditioning != "none"

    @property
    def gradient_checkpointing(self) -> bool:
        """As Diffusers asks for it and sets it: whether layers' activations are computed again."""
        return self.checkpoint_every > 0

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.checkpoint_every = int(enabled)

    def context(self, condition: Condition, grid: tuple[int, int]) -> BlockContext:
        """What the sequence's slots share, from the condition and the grid."""
        cond, log_level = parts_of(condition)
        config, device, dtype = self.config, compute_device(self.proj_in), compute_dtype(self.proj_in)
        prefix = added = rotation = None
        if self.proj_cond is not None:
            if cond is None:
                raise ValueError("this network reads a condition as a prefix, and got none")
            prefix = self.proj_cond(cond.to(device, dtype))
        if self.pos_embed is not None:
            if grid != (config.grid_size, config.grid_size):
                raise ValueError(
                    f"learned positions fit a grid of {config.grid_size} × {config.grid_size} tokens only, "
                    f"got {grid[0]} × {grid[1]}"
                )
            added = reorder(self.pos_embed, config.order, grid, dim=0)[None]  # (1, T, D)
        if self.class_embed is not None:
            table = torch.cat([self.class_embed, self.class_embed.mean(0, keepdim=True)])  # the last row: no class
            vector = table[cond][:, None] if cond is not None else table[-1:][None]  # (B or 1, 1, D)
            added = vector.expand(-1, grid[0] * grid[1], -1) if added is None else added + vector
        if self.level_embed is not None:
            if log_level is None:
                raise ValueError("this network is trained for many noise levels, and got none")
            vector = self.level_embed(log_level.to(device), dtype)[:, None].to(dtype)  # (B, 1, D)
            added = vector.expand(-1, grid[0] * grid[1], -1) if added is None else added + vector
        if config.positions != "learned":
            length = 0 if prefix is None else prefix.shape[1]
            dtype = torch.promote_types(dtype, torch.float32)
            if config.positions == "rotary":
                angles = rotary_angles(
                    grid, config.transformer.head_dim, config.position_length, length, config.text_axis, device, dtype
                )
            else:
                angles = rotary_angles_1d(length + grid[0] * grid[1], config.transformer.head_dim, device, dtype)
            if config.order in HELD:  # positions of a slot's own token
                prefix_angles, image_angles = angles.split([length, grid[0] * grid[1]])
                angles = torch.cat([prefix_angles, reorder(image_angles, config.order, grid, dim=0)])
            rotation = rotation_tables(angles)
        return BlockContext(prefix, added, rotation)

    def prefill(self, context: BlockContext, cache: KVCache, temperature: Tensor | None = None) -> None:
        """Write the prefix's keys and values to an empty cache; ``temperature`` as in `run`. Equal rows, such as the
        null condition's, go through the network once."""
        if context.prefix is None:
            return
        hidden, slots = context.prefix, context.prefix_length
        rows = (
            hidden
            if temperature is None
            else torch.cat([hidden, temperature[:, 0].to(hidden).expand(-1, slots, 1)], dim=2)
        )
        first, place = first_of_equals(rows.flatten(1))
        part = cache if len(first) == len(hidden) else cache.select(first)
        hidden, temperature = hidden[first], None if temperature is None else temperature[first]
        rotation = None if context.rotation is None else slots_of(context.rotation, 0, slots)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, rotation, temperature, part, index)
        if part is not cache:
            cache.keys_values[..., :slots, :] = part.keys_values[..., :slots, :][:, place]
        cache.advance(slots)

    def run(
        self,
        inputs: Tensor,
        first_slot: int,
        context: BlockContext,
        cache: Cache | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Outputs of a run of image slots.

        Args:
            inputs: what sits in slots first_slot … first_slot + S − 1, (B, S, C), in a scattered order
                (B, S, `HELD`·C).
            first_slot: 0 without a cache; with one, as many slots as it holds of image tokens.
            context: what `context` gave for this sequence.
            cache: the slots before; the new ones are written to it, and the prefix if it is empty.
            temperature: divides the attention logits, (B, 1, 1, 1).

        Returns:
            (B, S, outputs), at least float32 whatever the network's dtype.
        """
        slots, skip = inputs.shape[1], context.prefix_length
        dtype = compute_dtype(self.proj_in)
        hidden = self.proj_in(inputs.to(dtype)).to(dtype)  # (B, S, D); float32 under autocast, as is what is added
        if context.added is not None:
            hidden = hidden + context.added[:, first_slot : first_slot + slots]
        rotation = context.rotation
        if context.prefix is not None and (cache is None or cache.length == 0):
            hidden = torch.cat([context.prefix.to(hidden.dtype), hidden], dim=1)  # (B, L + S, D)
        else:
            skip = 0
        if rotation is not None:
            start = context.prefix_length - skip + first_slot
            rotation = slots_of(rotation, start, start + hidden.shape[1])
        for index, layer in enumerate(self.layers):
            # What is written to a cache would be written again.
            again = self.checkpoint_every and index % self.checkpoint_every == 0 and cache is None
            if again and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(layer, hidden, rotation, temperature, cache, index)
            else:
                hidden = layer(hidden, rotation, temperature, cache, index)
        if cache is not None:
            cache.advance(hidden.shape[1])
        hidden = hidden[:, skip:]
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        return at_least_float32(self.proj_out(hidden))

    def new_cache(self, batch_size: int, slots: int, dtype: torch.dtype) -> KVCache:
        """An empty cache for ``slots`` slots, prefix included."""
        config, device = self.config.transformer, compute_device(self.proj_in)
        return KVCache(config.layers, batch_size, config.num_kv_heads, slots, config.head_dim, device, dtype)


def recomputed(module: nn.Module, *inputs: Any) -> Any:
    """``module(*inputs)`` with activation checkpointing: only the inputs are kept, the rest is computed again in the
    backward pass. Dropout of adapters is drawn again with the same numbers."""
    dropout = any(isinstance(part, nn.Dropout) and part.training and part.p for part in module.modules())
    # Hooks that bring weights take them away again only if the pass is computed to its end.
    with set_checkpoint_early_stop(False) if weights_move(module) else nullcontext():
        return checkpoint(called_with_group, module, *inputs, use_reentrant=False, preserve_rng_state=dropout)


def first_of_equals(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows (R, N): the places of the first of each group of equal rows, (G,), and each row's group, (R,)."""
    every = torch.arange(len(rows), device=rows.device)
    _, group = at_least_float32(rows).sum(1).unique(return_inverse=True)  # equal rows have equal sums; few others do
    first = torch.full_like(every, len(rows)).scatter_reduce(0, group, every, "amin")[: int(group.max()) + 1]
    if len(first) == len(rows) or not torch.equal(rows, rows[first[group]]):
        return every, every
    return first, group

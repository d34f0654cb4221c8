"""StudentModel: a network with full attention that learns a flow's map from noise to data, to make a sample in one pass.

The method is BiFlow's (Lu et al., 2025, arXiv:2512.10953). The student is not a flow: it need not be invertible or causal.
Its hidden layers are aligned with the intermediate states of the flow, its teacher. Its last layers remove the training
noise. The guidance weight is an input, so guidance needs no second pass.

Shapes: B batch, C channels, H × W size of the latents, T tokens, D width, L prefix tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from tarflow.flows.habits import NetworkHabits, StudentOutput
from tarflow.flows.layers.affine import at_least_float32
from tarflow.flows.layers.config import CONDITIONINGS, TransformerConfig, check_head_dim
from tarflow.flows.layers.network import recomputed
from tarflow.flows.layers.order import patchify, unpatchify
from tarflow.flows.layers.positions import rotary_angles, rotation_tables
from tarflow.flows.layers.prepared import compute_device, compute_dtype
from tarflow.flows.layers.transformer import OutputLinear, RMSNorm, TransformerLayer

#: What a student gives: latents without the training noise, or with it, as the flow's inverse does.
TARGETS = ("clean", "noisy")
#: Numbers that a guidance weight is embedded by, and how many "time steps" the largest weight stands for.
WEIGHT_FEATURES, WEIGHT_STEPS = 64, 1000.0


class StudentModel(NetworkHabits, ModelMixin, ConfigMixin):
    """Noise, condition and guidance weight → latents.

    Args:
        in_channels, sample_size: of the flow.
        patch_size, patch_layout: of the student's own tokens; larger patches than the flow's make it faster.
        num_layers, width, head_dim: of the Transformer.
        conditioning, num_classes, cond_dim: of the flow; the student reads its condition as prefix tokens.
        state_layers: after how many layers each of the flow's intermediate states is read from the student, from the
            one next to the noise to the data with the training noise; empty for a student that was led by none.
        through_states: the states are all that the layers after them get, instead of a side output.
        max_guidance_scale: largest guidance scale that the student was trained with; 1 is none.
        guidance_method: "gaussian" or "linear", see `Guidance`.
        target: "clean" or "noisy", see `TARGETS`.
        flow_hashes: SHA-256 of the weights of the flow whose inverse this is, in forms that it may be stored in.

    Raises:
        ValueError: for settings that do not fit together.
    """

    _no_split_modules = ["TransformerLayer"]  # noqa: RUF012 (the library's interface)
    _skip_layerwise_casting_patterns = ["proj_in", "proj_cond", "embed_weight", "state_inputs", "head"]  # noqa: RUF012
    _repeated_blocks = ["TransformerLayer"]  # noqa: RUF012 (what `compile_repeated_blocks` compiles)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        sample_size: int = 8,
        patch_size: int = 1,
        patch_layout: str = "channel_last",
        num_layers: int = 8,
        width: int = 256,
        head_dim: int = 64,
        conditioning: str = "none",
        num_classes: int = 0,
        cond_dim: int = 0,
        state_layers: tuple[int, ...] = (),
        through_states: bool = False,
        max_guidance_scale: float = 1.0,
        guidance_method: str = "gaussian",
        target: str = "clean",
        flow_hashes: tuple[str, ...] = (),
    ):
        super().__init__()
        check_student(self.config)
        token_dim = in_channels * patch_size**2
        self.proj_in = nn.Linear(token_dim, width)
        self.proj_cond = self.embed_weight = None
        if conditioning != "none":
            self.proj_cond = nn.Linear(cond_dim if conditioning == "prefix" else num_classes, width)
        if max_guidance_scale > 1:
            self.weight_features = Timesteps(WEIGHT_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.embed_weight = TimestepEmbedding(WEIGHT_FEATURES, width)
        config = layer_config(self.config)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(num_layers))
        self.state_heads = nn.ModuleList(output_layer(width, token_dim) for _ in state_layers)
        self.state_inputs = nn.ModuleList(nn.Linear(token_dim, width) for _ in state_layers if through_states)
        self.head = output_layer(width, token_dim)
        self.gradient_checkpointing, self._gradient_checkpointing_func = False, recomputed

    def forward(
        self,
        z: Tensor,
        class_labels: Tensor | None = None,
        cond: Tensor | None = None,
        guidance_weight: Tensor | float = 0.0,
        return_states: bool = False,
        return_dict: bool | None = None,
    ) -> Tensor | tuple[Tensor] | tuple[Tensor, list[Tensor]] | StudentOutput:
        """Noise to data in one pass.

        Args:
            z: noise (B, C, H, W).
            class_labels: (B,) for the class conditionings.
            cond: prefix tokens (B, L, E) for the conditioning "prefix".
            guidance_weight: guidance scale − 1, one number or (B,).
            return_states: also what was read of the flow's states.
            return_dict: return a `StudentOutput`; False returns a tuple, also of one.

        Returns:
            latents (B, C, H, W), at least float32; with ``return_states`` also a list of (B, C, H, W), one for each of
            ``state_layers``.

        Raises:
            ValueError: if noise or condition do not fit the student.
        """
        config, p = self.config, self.config.patch_size
        if z.ndim != 4 or z.shape[1] != config.in_channels or z.shape[2] % p or z.shape[3] % p:
            raise ValueError(
                f"z must have the shape (B, {config.in_channels}, H, W), H and W multiples of {p}, got {tuple(z.shape)}"
            )
        grid = z.shape[2] // p, z.shape[3] // p
        prefix = self.prefix(len(z), class_labels, cond, guidance_weight)  # (B, L, D)
        length = prefix.shape[1]
        dtype = compute_dtype(self.proj_in)
        hidden = torch.cat([prefix, self.proj_in(patchify(z, p, config.patch_layout).to(dtype)).to(prefix.dtype)], 1)
        rotation = self.rotation(grid, length)
        states: list[Tensor] = []
        for number, layer in enumerate(self.layers, start=1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(layer, hidden, rotation)
            else:
                hidden = layer(hidden, rotation)
            if number in config.state_layers:
                place = config.state_layers.index(number)
                state = read(self.state_heads[place], hidden[:, length:])
                if config.through_states:
                    passed = self.state_inputs[place](state.to(dtype)).to(hidden.dtype)
                    hidden = torch.cat([hidden[:, :length], passed], dim=1)
                states.append(unpatchify(state, p, config.patch_layout, grid))
        x = unpatchify(read(self.head, hidden[:, length:]), p, config.patch_layout, grid)
        if return_dict:
            return StudentOutput(x, states if return_states else None)
        if return_states:
            return x, states
        return x if return_dict is None else (x,)

    def prefix(
        self, batch: int, class_labels: Tensor | None, cond: Tensor | None, guidance_weight: Tensor | float
    ) -> Tensor:
        """Condition and guidance weight as tokens before the image's, (B, L, D); L may be 0."""
        config, device, dtype = self.config, compute_device(self.proj_in), compute_dtype(self.proj_in)
        tokens = [torch.zeros(batch, 0, config.width, device=device, dtype=dtype)]
        if self.proj_cond is not None and config.conditioning == "prefix":
            if cond is None or cond.ndim != 3 or len(cond) not in (1, batch) or cond.shape[2] != config.cond_dim:
                found = None if cond is None else tuple(cond.shape)
                raise ValueError(f"cond must have the shape ({batch}, L, {config.cond_dim}), got {found}")
            tokens.append(self.proj_cond(cond.to(dtype)).expand(batch, -1, -1))
        elif self.proj_cond is not None:
            if class_labels is None or class_labels.shape != (batch,):
                found = None if class_labels is None else tuple(class_labels.shape)
                raise ValueError(f"class_labels must have the shape ({batch},), got {found}")
            # The label num_classes, "no class", is a row of zeros.
            vectors = F.one_hot(class_labels, config.num_classes + 1)[:, :-1].to(dtype)
            tokens.append(self.proj_cond(vectors)[:, None])
        if self.embed_weight is not None:
            values = torch.as_tensor(guidance_weight, dtype=torch.float32, device=device).expand(batch)
            features = self.weight_features(values * (WEIGHT_STEPS / (config.max_guidance_scale - 1)))
            tokens.append(self.embed_weight(features.to(dtype))[:, None])
        return torch.cat(tokens, dim=1)

    def rotation(self, grid: tuple[int, int], length: int) -> tuple[Tensor, Tensor]:
        """Tables of the rotary positions of the prefix and the image's tokens."""
        config, dtype = self.config, torch.promote_types(compute_dtype(self.proj_in), torch.float32)
        side, device = config.sample_size // config.patch_size, compute_device(self.proj_in)
        angles = rotary_angles(grid, config.head_dim, side, length, True, device, dtype)
        return rotation_tables(angles)


def check_student(config: Any) -> None:
    """Errors of a `StudentModel`'s arguments that do not fit together."""
    if not 1 <= config.patch_size <= config.sample_size or config.sample_size % config.patch_size:
        raise ValueError(f"patch_size ({config.patch_size}) must divide sample_size ({config.sample_size})")
    if config.width % config.head_dim:
        raise ValueError(f"head_dim ({config.head_dim}) must divide the student's width ({config.width})")
    check_head_dim(config.head_dim, "rotary", text_axis=True)
    if config.conditioning not in CONDITIONINGS:
        raise ValueError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {config.conditioning!r}")
    if config.target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {config.target!r}")
    if not config.max_guidance_scale >= 1:
        raise ValueError(f"max_guidance_scale must be at least 1 (off), got {config.max_guidance_scale}")
    places = list(config.state_layers)
    if places != sorted(set(places)) or not all(1 <= place <= config.num_layers for place in places):
        raise ValueError(f"state_layers must rise within 1 to {config.num_layers}, the student's layers; got {places}")


def layer_config(config: Any) -> TransformerConfig:
    """What the layers of a `StudentModel` are made of: the flow's own kind, with full attention and QK-norm."""
    heads = config.width // config.head_dim
    return TransformerConfig(
        layers=config.num_layers,
        width=config.width,
        head_dim=config.head_dim,
        num_heads=heads,
        num_kv_heads=heads,
        qk_norm=True,
        causal=False,
    )


def output_layer(width: int, outputs: int) -> nn.Sequential:
    """Norm and linear layer; an untrained one gives zeros."""
    linear = OutputLinear(width, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(RMSNorm(width), linear)


def read(head: nn.Sequential, hidden: Tensor) -> Tensor:
    """Tokens (B, T, C) of hidden ones (B, T, D), computed in at least float32."""
    return at_least_float32(head(hidden))

"""The optimizer of a training: AdamW, or Muon for hidden matrices and AdamW for all else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from tarflow.flows.layers.transformer import TransformerLayer
from tarflow.training.loop.config import OptimConfig
from tarflow.training.loop.muon import Muon


def make_optimizer(
    groups: Sequence[dict[str, Any]],
    optim: OptimConfig,
    module: nn.Module,
    betas: tuple[float, float] | None = None,
    fused: bool = True,
) -> torch.optim.AdamW:
    """The optimizer that the settings name.

    Args:
        groups: of parameters, with "peak_lr", the learning rate after the warm-up. Of each group Muon takes the hidden
            matrices; what is left of it stays with AdamW, and both are clipped together.
        optim: the settings.
        module: which has the parameters.
        betas: of AdamW; None takes those of the settings.
        fused: whether AdamW's step is one kernel for all parameters; Muon's AdamW always is.

    Raises:
        ValueError: if Muon finds no hidden matrix.
    """
    betas = optim.betas if betas is None else betas
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, optim.lr, betas=betas, weight_decay=optim.weight_decay, fused=fused or None)
    pieces = hidden_matrices(module)
    faster = 1.0 if optim.muon_lr is None else optim.muon_lr / optim.lr
    decay = optim.weight_decay if optim.muon_weight_decay is None else optim.muon_weight_decay
    split: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        hidden = [parameter for parameter in group["params"] if id(parameter) in pieces]
        others = [parameter for parameter in group["params"] if id(parameter) not in pieces]
        rate = group["peak_lr"] * faster
        matrices = {"muon": True, "weight_decay": decay, "lr": rate, "peak_lr": rate}
        matrices["pieces"] = [pieces[id(parameter)] for parameter in hidden]
        split += [{**group, "params": others, "clip_with": number}] if others else []
        split += [{**group, **matrices, "params": hidden, "clip_with": number}] if hidden else []
    if not any(group.get("muon") for group in split):
        raise ValueError("optimizer 'muon' is for hidden matrices, of which what is trained here has none: use adamw")
    return Muon(split, optim.lr, betas, optim.weight_decay, optim.muon_momentum)


def hidden_matrices(module: nn.Module) -> dict[int, int]:
    """What Muon is for: the matrices of Transformer layers, and the kernels inside of autoencoders. Embeddings, the
    first and last layers, norms, biases and text encoders are not.

    Returns:
        of how many matrices, one above the other, each parameter is made, by the parameter's ``id``: queries, keys and
        values have one for each head, which costs less than one for all and learns as well.
    """
    found: dict[int, int] = {}
    for part in module.modules():
        if isinstance(part, TransformerLayer):
            attention, mlp = part.attention, part.mlp
            found[id(attention.qkv.weight)] = attention.heads + 2 * attention.kv_heads
            found[id(mlp.up.weight)] = 2 if mlp.gated else 1
            found[id(attention.proj.weight)] = found[id(mlp.down.weight)] = 1
        elif isinstance(part, BasicTransformerBlock):
            found |= matrices_of_diffusers(part)
        elif isinstance(part, ResnetBlock2D | Downsample2D | Upsample2D):
            found |= {id(layer.weight): 1 for layer in part.modules() if isinstance(layer, nn.Conv2d)}
    return found


def matrices_of_diffusers(block: BasicTransformerBlock) -> dict[int, int]:
    """Those of a Transformer layer of Diffusers: attentions and MLP, without what makes its norms depend on time."""
    found = {id(layer.weight): 1 for layer in block.ff.modules() if isinstance(layer, nn.Linear)}
    for attention in (block.attn1, block.attn2):
        if attention is not None:
            found |= {id(layer.weight): attention.heads for layer in (attention.to_q, attention.to_k, attention.to_v)}
            found[id(attention.to_out[0].weight)] = 1
    return found

"""A training step as the published code takes it, as a baseline for speed; on the weights of a `TARFlowModel`.

It gives the same loss. What is done as there, by the sources ml-tarflow and ml-starflow (both `transformer_flow.py`
and `train.py`); models with learned positions go by the first, all others by the second:

- Every block's output, and its log-det (STARFlow: elementwise, TARFlow: its mean), are kept in lists to the end.
- The loss is mean(½z²) − Σ mean(log-det) over those lists, and is read (`.item()`) at each step.
- Query, key and value are split and handled one by one. STARFlow: angles are made anew by every block, their cosines
  and sines by every layer for queries and keys each, pairs are rotated by stacking; key/value heads are repeated;
  prefix and image tokens are joined and parted by every layer, and the final norm sees both.
- TARFlow hands an explicit lower-triangular mask to attention, a float buffer made boolean at each call. STARFlow's
  training does not ("do not pass mask to enable flash attention"): its attention is told to be causal.
- Norms in float32, cast back; but STARFlow's layer norm is torch's, which autocast runs in float32 and leaves there.
- Under autocast the residual stream has the precision of the first projection, and so do the tokens between blocks
  and the affine map's parameters.
- Nothing is compiled or computed again; AdamW is torch's default implementation, not the fused one.

In favour of the baseline: STARFlow makes positions and frequencies on the CPU and copies them to the device in every
block; here they are made on the device. They are float32 here, and bfloat16 there under autocast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow.flows.layers.affine import SOFTPLUS_OFFSET, at_least_float32
from tarflow.flows.layers.order import reorder, restore
from tarflow.flows.layers.positions import rotary_angles, rotary_angles_1d
from tarflow.flows.layers.scattered import SCATTERED


def is_tarflow(block: Any) -> bool:
    """Whether ml-tarflow's code is the model, which has learned positions; else ml-starflow's."""
    return block.config.positions == "learned"


def normed(norm: Any, x: Tensor, tarflow: bool) -> Tensor:
    """A norm of (…, D); its own forward is float32 and casts back."""
    if tarflow or not hasattr(norm, "bias"):
        return norm(x)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys (B, heads, S, d), with angles of each number of a head, (S, d)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * angles.cos() + torch.stack((-second, first), dim=-1).flatten(-2) * angles.sin()


def attention(module: Any, x: Tensor, angles: Tensor | None, mask: Tensor | None, tarflow: bool) -> Tensor:
    """One layer's attention, (B, S, D)."""
    batch, slots, _ = x.shape
    sizes = [count * module.head_dim for count in (module.heads, module.kv_heads, module.kv_heads)]
    q, k, v = (
        part.view(batch, slots, -1, module.head_dim).transpose(1, 2)
        for part in module.qkv(normed(module.norm, x, tarflow)).split(sizes, dim=-1)
    )
    if module.query_norm is not None:
        q, k = module.query_norm(q), module.key_norm(k)
    if angles is not None:
        q, k = rotated(q, angles), rotated(k, angles)
    if module.heads != module.kv_heads:
        k, v = (part.repeat_interleave(module.heads // module.kv_heads, dim=1) for part in (k, v))
    if not tarflow:
        q, k, v = q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)
    mask = None if mask is None else mask.bool()
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=1 / math.sqrt(module.head_dim)
    )
    y = module.proj(y.transpose(1, 2).reshape(batch, slots, -1))
    return y if module.post_norm is None else module.post_norm(y)


def mlp(module: Any, x: Tensor, tarflow: bool) -> Tensor:
    """One layer's MLP, (B, S, D); the gated one has two projections of its own."""
    y = normed(module.norm, x, tarflow)
    if module.gated:
        biases = (None, None) if module.up.bias is None else module.up.bias.chunk(2)
        gate, up = (F.linear(y, *part) for part in zip(module.up.weight.chunk(2), biases, strict=True))
        y = module.down(F.gelu(gate, approximate="tanh") * up)
    else:
        y = module.down(F.gelu(module.up(y)))
    return y if module.post_norm is None else module.post_norm(y)


def embedded(block: Any, x: Tensor, grid: tuple[int, int], cond: Tensor | None) -> Tensor:
    """Embeddings (B, S, D) of tokens in the block's order, with learned positions and class vectors."""
    if block.config.order in SCATTERED:
        raise ValueError("the published models have no deep_order: leave it out to compare with their steps")
    hidden = block.proj_in(x)
    if block.pos_embed is not None:
        hidden = hidden + reorder(block.pos_embed, block.config.order, grid, dim=0)
    if block.class_embed is not None:
        mean = block.class_embed.mean(dim=0)
        if cond is None:
            raise ValueError("the published models have class labels for each sample")
        missing = cond == block.config.num_classes
        if missing.any():
            missing = missing.to(mean.dtype).view(-1, 1, 1)
            known = block.class_embed[cond.clamp(max=block.config.num_classes - 1)][:, None]
            hidden = hidden + ((1 - missing) * known + missing * mean)
        else:
            hidden = hidden + block.class_embed[cond][:, None]
    return hidden


def transformed(block: Any, x: Tensor, grid: tuple[int, int], cond: Tensor | None) -> Tensor:
    """The network's outputs for all S slots, (B, S, outputs), from tokens in the block's order."""
    tarflow, config = is_tarflow(block), block.config
    hidden = embedded(block, x, grid, cond)
    prefix = None if block.proj_cond is None else block.proj_cond(cond)
    length = 0 if prefix is None else prefix.shape[1]
    angles = mask = None
    dtype = at_least_float32(x).dtype
    if config.positions == "rotary":
        angles = rotary_angles(
            grid, config.transformer.head_dim, config.position_length, length, config.text_axis, x.device, dtype
        )
    elif config.positions == "rotary_1d":
        angles = rotary_angles_1d(length + x.shape[1], config.transformer.head_dim, x.device, dtype)
    if angles is not None:
        angles = angles.repeat_interleave(2, dim=-1)
    if tarflow:
        slots = length + x.shape[1]
        mask = torch.ones(slots, slots, device=x.device).tril()
    for layer in block.layers:
        joined = hidden if prefix is None else torch.cat([prefix, hidden], dim=1)
        joined = joined + attention(layer.attention, joined, angles, mask, tarflow)
        joined = joined + mlp(layer.mlp, joined, tarflow)
        prefix, hidden = (None, joined) if prefix is None else (joined[:, :length], joined[:, length:])
    if block.final_norm is not None:
        hidden = block.final_norm(hidden)
        prefix = None if prefix is None else block.final_norm(prefix)
    out = block.proj_out(hidden)
    return config.soft_clip * torch.tanh(out / config.soft_clip) if config.soft_clip > 0 else out


def block_as_published(block: Any, x: Tensor, grid: tuple[int, int], cond: Tensor | None) -> tuple[Tensor, Tensor]:
    """One block: z (B, T, C), row-major, and its log-det: (B, T, C) elementwise, or TARFlow's mean, (B,)."""
    x = reorder(x, block.config.order, grid)
    inputs = x
    if block.start_token is not None:
        inputs = torch.cat([block.start_token.expand(len(x), 1, -1), x[:, :-1]], dim=1)
    out = transformed(block, inputs, grid, cond)
    if block.start_token is None:
        out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
    raw, shift = (torch.zeros_like(out), out) if block.config.scale == "additive" else out.chunk(2, dim=-1)
    if is_tarflow(block) and block.config.scale != "softplus":
        z = (x - shift) * (-at_least_float32(raw)).exp().to(raw.dtype)
        return restore(z, block.config.order, grid), -raw.mean(dim=[1, 2])
    dtype = raw.dtype
    raw, shift, x = at_least_float32(raw), at_least_float32(shift), at_least_float32(x.clone())
    scale = F.softplus(raw + SOFTPLUS_OFFSET) if block.config.scale == "softplus" else raw.exp()
    return restore((x - shift) / scale, block.config.order, grid).to(dtype), -torch.log(scale)


def loss_as_published(model: Any, x: Tensor, class_labels: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
    """The training loss, a scalar; arguments as of `TARFlowModel.forward`."""
    condition = model.condition(class_labels, cond, len(x))
    tokens, grid = model.patchify(x)
    outputs, log_dets = [tokens], []
    for block in model.blocks:
        tokens, log_det = block_as_published(block, tokens, grid, condition)
        outputs.append(tokens)
        log_dets.append(log_det)
    z = model.unpatchify(outputs[-1], grid)
    prior = 0.5 * z.pow(2).mean(dim=tuple(range(1, z.dim())))
    volume = -sum(log_det.flatten(1).mean(1) if log_det.dim() > 1 else log_det for log_det in log_dets)
    return (prior + volume).mean()


def optimizer_as_published(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), lr=lr, weight_decay=1e-4)


def step_as_published(
    model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor], bfloat16: bool, max_norm: float = 1.0
) -> Tensor:
    """One step of training; returns the loss, detached.

    Args:
        inputs: keyword arguments of the model's forward.
        bfloat16: under autocast; else float32.
        max_norm: of the gradients.
    """
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
        loss = loss_as_published(model, **inputs)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    loss.item()
    return loss.detach()

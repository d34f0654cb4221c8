"""How a block is inverted: which method, how exactly; and what all methods need of a block.

Shapes: B batch, R rows (B, or 2·B in guided blocks), T tokens, S tokens of a segment, C channels of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from tarflow.flows.decoding.names import DEFAULT_TOLERANCE, FAST_TOLERANCE, METHODS
from tarflow.flows.layers.affine import affine_forward
from tarflow.flows.layers.block import Block, Flow
from tarflow.flows.layers.condition import Condition, parts_of, with_level
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.kv_cache import KVCache
from tarflow.flows.layers.order import reorder, restore
from tarflow.flows.layers.prepared import at_hand, compute_device, compute_dtype
from tarflow.flows.layers.scattered import SCATTERED, held_tokens

#: How far samples are from exact ones at most with these tolerances, and the guidance scale up to which that holds (see
#: docs/sampling.md for how it was measured): stronger guidance magnifies errors, those of rounding too.
PROMISES = {DEFAULT_TOLERANCE: (1e-3, 3.0), FAST_TOLERANCE: (0.1, 6.0)}


@dataclass(frozen=True)
class Decoding:
    """How to invert a block.

    Attributes:
        method: "sequential", token after token, exact to rounding; "jacobi", all tokens at once, again and again until
            nothing changes; "gs_jacobi" (Gauss–Seidel–Jacobi), segment after segment, Jacobi within; "parallel", the
            one exact pass of coupling and inverse autoregressive blocks, which they also take for "sequential"; "auto",
            what `calibrate` found to be the fastest on this device.
        tolerance: a sample is done when its largest change in a sweep, or the change that extrapolation still expects,
            is below this. After as many sweeps as a segment has tokens it is exact anyway.
        segment: tokens of a segment, for "gs_jacobi".
    """

    method: str = "sequential"
    tolerance: float = DEFAULT_TOLERANCE
    segment: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"the decoding method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not (isinstance(self.tolerance, Real) and self.tolerance > 0):
            raise ValueError(f"the decoding tolerance must be positive, got {self.tolerance!r}")
        if self.method == "gs_jacobi" and self.segment is None:
            raise ValueError("the decoding method 'gs_jacobi' needs a segment, a number of tokens")
        if self.segment is not None and not (isinstance(self.segment, Integral) and self.segment >= 1):
            raise ValueError(f"the decoding segment must be at least 1 token, got {self.segment!r}")


class InversionState:
    """One block and everything that stays the same while it is inverted: conditions, guidance, cache.

    Args:
        block: a `FlowBlock`.
        batch: B.
        grid: rows and columns of tokens.
        cond, null_cond: what the block sees, and what its second pass sees under guidance; the noise level is that of
            ``cond`` in both.
        guidance: None or weight 0 for one pass only. It acts in blocks that see the condition, and with an attention
            temperature other than 1 in all of them.
        cached: keep keys and values; the prefix is written at once.
    """

    def __init__(
        self,
        block: Block,
        batch: int,
        grid: tuple[int, int],
        cond: Condition,
        null_cond: Condition,
        guidance: Guidance | None,
        cached: bool = True,
    ):
        self.block, self.batch, self.grid, self.num_tokens = block, batch, grid, grid[0] * grid[1]
        if guidance is not None and not (guidance.active and (block.sees_condition or guidance.temperature != 1)):
            guidance = None
        self.guidance = guidance
        device, dtype = compute_device(block.proj_in), compute_dtype(block.proj_in)
        rows = batch
        (given, log_level), (null, _) = parts_of(cond), parts_of(null_cond)
        self.temperature: Tensor | None = None
        if guidance is not None:
            rows = 2 * batch
            log_level = None if log_level is None else torch.cat([log_level, log_level])  # no pass is without it
            if block.sees_condition and (given is not None or null is not None):
                given = torch.cat([expand_rows(given, block, batch), expand_rows(null, block, batch)])
            if guidance.temperature != 1:
                self.temperature = torch.ones(
                    rows, 1, 1, 1, device=device, dtype=torch.promote_types(dtype, torch.float32)
                )
                self.temperature[batch:] = guidance.temperature
        self.context = block.context(with_level(given if block.sees_condition else None, log_level), grid)
        #: What stands before token 0, (C,), or None.
        self.start_token = None if block.start_token is None else block.start_token.to(device)
        #: The first token that is made; without a start token, token 0 passes unchanged.
        self.first = 0 if self.start_token is not None else 1
        self.kept: KVCache | None = None
        if cached:
            slots = self.context.prefix_length + self.num_tokens
            self.kept = block.new_cache(rows, slots, dtype)
            block.prefill(self.context, self.kept, self.temperature)

    @property
    def cache(self) -> KVCache:
        """Keys and values so far.

        Raises:
            ValueError: if none are kept.
        """
        if self.kept is None:
            raise ValueError("this inversion keeps no keys and values: it has one pass over all tokens")
        return self.kept

    def before_first(self, rows: int, dtype: torch.dtype) -> Tensor:
        """What stands before token 0 where that is made too, (rows, C)."""
        assert self.start_token is not None  # `first` is 0
        return self.start_token.to(dtype).expand(rows, -1)

    def next_inputs(self, made: Sequence[Tensor], like: Tensor) -> Tensor:
        """What sits in the slot of the next token, (B, C) or in a scattered order (B, `HELD`·C).

        Args:
            made: the tokens before it, (B, C) each.
            like: a tensor of B rows, and of the tokens' dtype.
        """
        order = self.block.config.order
        if order not in SCATTERED:
            return made[-1] if made else self.before_first(len(like), like.dtype)
        first, held = self.before_first(len(like), like.dtype), held_tokens(order, self.grid)[len(made)]
        return torch.cat([made[token] if token < len(made) else first for token in held], dim=1)

    def doubled(self, inputs: Tensor) -> Tensor:
        """The rows that the network sees: both passes of a guided block."""
        return inputs if self.guidance is None else torch.cat([inputs, inputs])

    def combined(self, parameters: tuple[Tensor, Tensor], token: int | Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log-scale (B, …) of R rows' parameters."""
        return combine(self.guidance, parameters, token, self.num_tokens)

    def parameters(self, x: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Shift and log-scale (B, S, C) of tokens start … end − 1, from all tokens before each, in one parallel pass.

        With a cache, it must hold the slots before ``start``; theirs are written behind.
        """
        token = torch.arange(start, end, device=x.device)[:, None]
        inputs = self.doubled(self.block.slot_inputs(x, self.grid, start, end))
        parameters = self.block.affine_parameters(inputs, start - self.first, self.context, self.kept, self.temperature)
        return self.combined(parameters, token)

    def select(self, active: Tensor) -> InversionState:
        """The same for some of the B samples, (B,) booleans; the cache is copied."""
        rows = active if self.guidance is None else torch.cat([active, active])
        run = copy.copy(self)
        run.batch = int(active.sum())
        run.context = self.context.select(rows)
        run.kept = None if self.kept is None else self.kept.select(rows)
        run.temperature = None if self.temperature is None else self.temperature[rows]
        return run


def combine(
    guidance: Guidance | None, parameters: tuple[Tensor, Tensor], token: int | Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Shift and log-scale (B, …) of those of both passes, (2·B, …); without guidance there is one pass."""
    if guidance is None:
        return parameters
    (shift, shift_u), (log_scale, log_scale_u) = (part.chunk(2) for part in parameters)
    return guidance((shift, log_scale), (shift_u, log_scale_u), token, num_tokens)


def beyond_promise(decodings: Sequence[Decoding], guidance_scale: float) -> str | None:
    """A sentence if guidance is so strong that what a tolerance promises does not hold; None if it does, or if all blocks
    are inverted without one.

    Args:
        decodings: of each block, "auto" resolved.
        guidance_scale: 1 is off.
    """
    swept = [one.tolerance for one in decodings if one.method in ("jacobi", "gs_jacobi")]
    fits = [tolerance for tolerance in PROMISES if swept and max(swept) <= tolerance]
    if not fits or guidance_scale <= PROMISES[min(fits)][1]:
        return None
    error, scale = PROMISES[min(fits)]
    return (
        f"guidance_scale {guidance_scale:g} is above {scale:g}, up to which decoding with a tolerance of {max(swept):g} "
        f"keeps latents within {error:g} of exact ones: return_residual=True tells how exact they are, and "
        'decoding="sequential" is exact to rounding, which strong guidance magnifies too'
    )


def check_method(decoding: Decoding, one_pass: bool) -> None:
    """An error for a method that is not for blocks that are inverted in one pass, or only for them."""
    if one_pass and decoding.method not in ("sequential", "parallel"):
        raise ValueError(
            f"this model's blocks are inverted exactly in one parallel pass, so there is no {decoding.method!r}: leave "
            "decoding out"
        )
    if not one_pass and decoding.method == "parallel":
        raise ValueError(
            "the decoding method 'parallel' is for coupling and inverse autoregressive blocks; these ones make token "
            "after token: leave decoding out"
        )


def expand_rows(cond: Tensor | None, block: Block, batch: int) -> Tensor:
    """A block's condition with one row per sample; class vectors without a label take the "no class" row."""
    if cond is None:
        return torch.full((batch,), block.config.num_classes, device=compute_device(block.proj_in))
    return cond.expand(batch, *cond.shape[1:])


def check_finite(x: Tensor, block: str) -> None:
    """Raise a FloatingPointError that names the block and the first step with a number that is not finite.

    Args:
        x: decoded tokens in the block's order, (B, T, C).
    """
    finite = x.isfinite().all(dim=2)  # (B, T)
    if not bool(finite.all()):
        step = int((~finite.all(dim=0)).nonzero()[0])
        raise FloatingPointError(
            f"decoding gave numbers that are not finite, first in {block} at token {step} of {x.shape[1]} in the "
            "block's order; check the weights, the noise, and use a wider dtype or less guidance"
        )


@torch.no_grad()
def residual(
    model: Flow,
    x: Tensor,
    z: Tensor,
    cond: Condition = None,
    null_cond: Condition = None,
    guidance: Guidance | Sequence[Guidance] | None = None,
) -> tuple[Tensor, Tensor]:
    """How exact samples are: |f(x) − z| from one parallel pass of the (guided) map f.

    Args:
        model: a `TARFlowModel`.
        x: samples, not denoised; z: the noise that they were made of, (B, C, H, W) both.
        cond, null_cond, guidance: as they were made with.

    Returns:
        the largest and the mean of each sample, (B,) both.
    """
    tokens = guided_states(model, x, cond, null_cond, guidance)[-1]
    error = (tokens - model.patchify(z)[0]).abs().flatten(1)
    return error.amax(1), error.mean(1)


@torch.no_grad()
def guided_states(
    model: Flow,
    x: Tensor,
    cond: Condition = None,
    null_cond: Condition = None,
    guidance: Guidance | Sequence[Guidance] | None = None,
) -> list[Tensor]:
    """What each block of the (guided) map from data to noise makes, in one parallel pass.

    Given the tokens before it, a guided token is still an affine function of its noise, so the guided map too goes from
    data to noise without drawing.

    Args:
        model: a `TARFlowModel`.
        x: data with the training noise (B, C, H, W).
        cond, null_cond, guidance: see `InversionState`; guidance of all blocks, or one for each in the order of
            ``model.blocks``.

    Returns:
        row-major tokens (B, T, C), from the block next to the data to z.
    """
    tokens, grid = model.patchify(x)
    states = []
    guidances: Sequence[Guidance | None] = (
        guidance if isinstance(guidance, Sequence) else [guidance] * len(model.blocks)
    )
    for place, block, given in zip(range(len(guidances)), model.blocks, guidances, strict=True):
        own = None if given is None else given.of_block(place + 1 == len(guidances))
        with torch.autocast(x.device.type, enabled=False):  # as the inverse
            tokens = guided_tokens(block, tokens, grid, cond, null_cond, own)
        states.append(tokens)
    return states


def guided_tokens(
    block: Block,
    tokens: Tensor,
    grid: tuple[int, int],
    cond: Condition,
    null_cond: Condition,
    guidance: Guidance | None,
) -> Tensor:
    """What one block of the guided map makes of row-major tokens (B, T, C), see `guided_states`."""
    if block.one_pass:
        return block(tokens, grid, cond, null_cond, guidance)[0]
    ordered = reorder(tokens, block.config.order, grid)
    out = ordered.clone()
    with at_hand(block):
        run = InversionState(block, len(tokens), grid, cond, null_cond, guidance, cached=False)
        if run.num_tokens > run.first:
            shift, log_scale = run.parameters(ordered, run.first, run.num_tokens)
            out[:, run.first :], _ = affine_forward(ordered[:, run.first :], shift, log_scale)
    return restore(out, block.config.order, grid)

"""Tokens that are made whole on the device by compiled operations, on CUDA devices captured as one graph, once and for all
batches of one shape."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from tarflow.common.clock import clock
from tarflow.flows.decoding.fused import FusedLayers, suits, ways_on
from tarflow.flows.decoding.method import InversionState, combine
from tarflow.flows.decoding.resident import RESIDENT_WAYS, ResidentLayers, can_stay
from tarflow.flows.decoding.step import DecodeStep, ModuleStep, StaticStep, decode_step
from tarflow.flows.layers.affine import affine_inverse
from tarflow.flows.layers.order import held_places
from tarflow.flows.layers.prepared import leaves_after_use, may_prepare, state_of
from tarflow.flows.layers.scattered import SCATTERED

logger = logging.get_logger(__name__)

NOT_COMPILED = (
    "Decode steps are not compiled for blocks with hooks, quantized or parametrized weights, or adapters other than plain "
    "LoRA in float32: these blocks go through their modules, which is right but slower. Fuse the adapters or remove the "
    "hooks, or leave enable_fast_decoding out."
)
OFFLOADED = (
    "Decode steps are not compiled where weights leave the device after each use, as with enable_model_cpu_offload: what is "
    "compiled would keep them there, and would have to be made anew for each call. Leave one of the two out."
)
#: Tokens and turns by which ways are compared, and how far their tokens may be apart, on average, for rounding.
TRIED, TURNS, ROUNDING = 24, 3, 0.03
#: Calls before a CUDA graph is captured: compilation and the libraries' own warm-up are then over.
WARM_UP_CALLS = 3


class FastStep:
    """Makes one token of a block: the network, guidance, and the affine map of the token's noise. It reads and writes
    buffers at a position that is stored on the device, so between tokens the host only starts the next one.

    Shapes: B batch, T tokens, C channels of a token.

    Args:
        step: the network; its cache becomes this one's own.
        run: a block of the shapes, with the kind of guidance.
        dtype: of the tokens, at least float32.
        backend: of `torch.compile`; None does not compile.
        pool: of CUDA graphs that are never replayed at the same time, see `torch.cuda.graph_pool_handle`.
        fused: computes the layers instead of the step, from the same weights and cache.

    Attributes:
        trials: milliseconds of a token by the ways that were tried before this one was taken, by name.
    """

    def __init__(
        self,
        step: StaticStep,
        run: InversionState,
        dtype: torch.dtype,
        backend: str | None = "inductor",
        pool: Any = None,
        fused: FusedLayers | ResidentLayers | None = None,
    ):
        self.step, self.pool, self.fused = step, pool, fused
        self.trials: dict[str, float] = {}
        #: What compilers see as one call: they would copy the cache that it writes to.
        self.layers = step.run_layers if fused is None else torch.compiler.disable(lambda *inputs: fused(*inputs))
        self.graph: torch.cuda.CUDAGraph | None = None
        device, channels = step.cache.keys_values.device, step.config.token_dim
        self.first, self.num_tokens, self.prefix_length = run.first, run.num_tokens, run.context.prefix_length
        self.position = torch.zeros((), dtype=torch.int64, device=device)  # of the next token's input in the cache
        self.previous = torch.zeros(run.batch, channels, dtype=dtype, device=device)
        #: Noise, tokens and log-scales, (T + 1, B, C) each; behind the tokens is what stands before the first.
        self.noise, self.x, self.log_scales = (
            torch.zeros(run.num_tokens + 1, run.batch, channels, dtype=dtype, device=device) for _ in range(3)
        )
        #: Which tokens each slot holds, if not the previous one, (T, `HELD`).
        order = step.config.order
        self.held = held_places(order, run.grid, device) if order in SCATTERED else None
        #: Of guidance; on the device, so that another weight needs no other graph.
        self.weight = torch.zeros((), dtype=dtype, device=device)
        self.guidance = None if run.guidance is None else replace(run.guidance, weight=self.weight)
        self.function: Callable[[], None] = self.make_token
        if backend is not None:
            own = with_code_of_its_own(self.make_token)
            self.function = torch.compile(own, backend=backend, dynamic=False, fullgraph=fused is None)
        self.captures = device.type == "cuda"

    def make_token(self) -> None:
        """The token at `position`, and on to the next."""
        token = self.position - self.prefix_length + self.first
        place = token.view(1)
        rows = self.previous
        if self.held is not None:
            held = self.held.index_select(0, place).squeeze(0)
            rows = self.x.index_select(0, held).transpose(0, 1).flatten(1)  # (B, HELD·C)
        rows = rows if self.guidance is None else torch.cat([rows, rows])
        parameters = self.step.leave(self.layers(self.step.enter(rows, self.position), self.position))
        shift, log_scale = combine(self.guidance, parameters, token, self.num_tokens)
        x = affine_inverse(self.noise.index_select(0, place).squeeze(0), shift, log_scale)
        self.x.index_copy_(0, place, x.unsqueeze(0))
        self.log_scales.index_copy_(0, place, log_scale.unsqueeze(0))
        self.previous.copy_(x)
        self.position.add_(1)

    def start(self, run: InversionState) -> None:
        """Begin a sequence whose prefix is in the run's cache."""
        self.step.refresh()
        self.step.load(run.context, run.cache, run.temperature)
        if run.guidance is not None:
            self.weight.fill_(run.guidance.weight)
        self.position.fill_(self.prefix_length)
        if self.captures and self.graph is None:
            with current(self.position.device):
                self.capture()

    def capture(self) -> None:
        """Warm up on a side stream, as CUDA graphs want it, then capture one call; what that wrote is written again."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self.function()
                self.position.fill_(self.prefix_length)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.function()
        self.graph = graph  # not before: after an error there is none

    @property
    def name(self) -> str:
        return self.step.attention_way.name if self.fused is None else self.fused.way.name

    def tried(self, run: InversionState) -> tuple[Tensor, float]:
        """Tokens whose noise is 1, of the beginning and the middle of a sequence, made several times, (times, n, B, 2C), and
        milliseconds of a token in the middle."""
        self.start(run)
        one = self.function if self.graph is None else self.graph.replay
        self.noise.fill_(1.0)
        count = min(TRIED, self.num_tokens - self.first)
        made, seconds = [], []
        for _ in range(TURNS):
            for begin in (0, (self.num_tokens - self.first - count) // 2):
                self.position.fill_(self.prefix_length + begin)
                self.previous.zero_()
                self.x.zero_()
                begun = clock(self.position.device)
                with current(self.position.device):
                    for _ in range(count):
                        one()
                seconds.append(clock(self.position.device) - begun)
                tokens = slice(self.first + begin, self.first + begin + count)
                made.append(torch.cat([self.x[tokens], self.log_scales[tokens]], dim=-1))
        return torch.cat(made).unflatten(0, (TURNS, -1)), 1e3 * min(seconds[1::2]) / count

    def decode(self, run: InversionState, z: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and results as of `decode_sequential`; the run is the one of `start`."""
        count = z.shape[1]
        self.noise[:count].copy_(z.transpose(0, 1))
        if self.first == 0:
            self.previous.copy_(run.before_first(len(self.previous), self.previous.dtype))
            self.x[-1].copy_(self.previous)
        else:  # token 0 passes unchanged
            self.previous.copy_(z[:, 0])
            self.x[0].copy_(z[:, 0])
            self.log_scales[0].zero_()
        one = self.function if self.graph is None else self.graph.replay
        with current(self.position.device):
            for _ in range(self.first, count):
                one()
        # Copies, as the next sequence writes to these buffers again.
        x, log_scales = (torch.stack(part[:count].unbind(0), dim=1) for part in (self.x, self.log_scales))
        return x, log_scales


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one, whose streams graphs and kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def fastest(steps: Sequence[FastStep], run: InversionState) -> FastStep:
    """The step whose tokens take the least time, of the first one and those that make the tokens of the first one up to
    rounding, each time the same; what fails is left out with a warning."""
    first, *others = steps
    expected, least = first.tried(run)
    best, trials = first, {first.name: least}
    for step in others:
        try:
            made, milliseconds = step.tried(run)
        except Exception as error:  # noqa: BLE001 (whatever a kernel cannot do, the first step does)
            logger.warning(
                f"Decode steps with layers {step.name} failed and are left out: {type(error).__name__}: {error}"
            )
            continue
        difference = float((made - expected).abs().mean())
        if not difference < ROUNDING * (1 + float(expected.abs().mean())):
            logger.warning(f"Decode steps with layers {step.name} differ by {difference:.2g} and are left out.")
            continue
        if not same_each_time(made) and same_each_time(expected):  # kernels that did not wait for one another
            logger.warning(f"Decode steps with layers {step.name} are not the same each time and are left out.")
            continue
        trials[step.name] = milliseconds
        if milliseconds < least:
            best, least = step, milliseconds
    best.trials = trials
    return best


def same_each_time(made: Tensor) -> bool:
    """Whether repeated tokens, along the first dimension, are equal to the bit."""
    return torch.equal(made, made[:1].expand_as(made))


def with_code_of_its_own(method: Any) -> Callable[[], None]:
    """The same method with a new code object. The compiler caches what it compiled by code object, eight at most: with
    two kinds of blocks, four batch sizes would fill that."""
    function = method.__func__
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )
    return types.MethodType(own, method.__self__)


class FastSteps:
    """Fast steps by block and shape, made when they are first needed and kept.

    Args:
        backend: see `FastStep`.
    """

    def __init__(self, backend: str | None = "inductor"):
        self.backend = backend
        self.pool: Any = None
        self.steps: dict[tuple[Any, ...], tuple[tuple[Any, ...], FastStep]] = {}

    def get(self, run: InversionState, dtype: torch.dtype) -> FastStep | DecodeStep | ModuleStep:
        """The step of a run's block and shape, and of tokens of a dtype, ready for its sequence.

        Made anew if the block has other weights or adapters; not compiled where something acts on the block's modules or
        takes its weights away, with a warning.
        """
        if leaves_after_use(run.block):
            logger.warning_once(OFFLOADED)
            self.steps = {key: step for key, step in self.steps.items() if key[0] != id(run.block)}
            return decode_step(run.block, run.context, run.cache, run.temperature)
        if not may_prepare(run.block):
            logger.warning_once(NOT_COMPILED)
            return ModuleStep(run.block, run.context, run.cache, run.temperature)
        block, shape = run.block, tuple(run.cache.keys_values.shape)
        kind = None if run.guidance is None else replace(run.guidance, weight=1.0)
        numbers = (run.cache.keys_values.dtype, dtype)
        key = (id(block), shape, run.context.prefix_length, numbers, kind, run.temperature is None)
        weights = state_of(block)
        if key not in self.steps or self.steps[key][0] != weights:
            # What is made in inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                cache = block.new_cache(shape[1], run.cache.capacity, run.cache.keys_values.dtype)
                cache.keys_values.zero_()  # slots behind the mask must be finite
                step = StaticStep(block, run.context, cache, run.temperature)
                if self.pool is None and cache.keys_values.is_cuda:
                    self.pool = torch.cuda.graph_pool_handle()
                self.steps[key] = (weights, self.made(step, run, dtype))
        fast = self.steps[key][1]
        fast.start(run)
        return fast

    def made(self, step: StaticStep, run: InversionState, dtype: torch.dtype) -> FastStep:
        """A fast step; where kernels of whole layers suit the block, the fastest of all that there are; else the one with
        the fastest attention."""
        if not suits(run.block, step):
            return self.with_attention(step, run, dtype)
        plain = FastStep(step, run, dtype, self.backend, self.pool)
        ways: list[FusedLayers | ResidentLayers] = []
        ways += [FusedLayers(run.block, step, way) for way in ways_on(step.cache.keys_values.device)]
        if can_stay(run.block, step):
            ways += [ResidentLayers(run.block, step, way) for way in RESIDENT_WAYS]
        return fastest([plain, *(FastStep(step, run, dtype, self.backend, self.pool, way) for way in ways)], run)

    def with_attention(self, step: StaticStep, run: InversionState, dtype: torch.dtype) -> FastStep:
        """A fast step by the fastest way of attention, if there are several. They are tried uncompiled, since the
        compiler takes long and does not change these kernels; then one is compiled."""
        ways = step.ways()
        if not ways:
            return FastStep(step, run, dtype, self.backend, self.pool)
        best = fastest([FastStep(way, run, dtype, None, self.pool) for way in ways], run)
        if self.backend is None:
            return best
        compiled = FastStep(best.step, run, dtype, self.backend, self.pool)
        compiled.trials = best.trials
        return compiled

"""Tokens that are made whole on the device by compiled operations, on CUDA devices captured as one graph, once and for all
batches of one shape."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from tarflow.flows.decoding.method import InversionState, combine
from tarflow.flows.decoding.step import DecodeStep, ModuleStep, StaticStep, decode_step
from tarflow.flows.layers.affine import affine_inverse
from tarflow.flows.layers.prepared import leaves_after_use, may_prepare, state_of

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
    """

    def __init__(
        self,
        step: StaticStep,
        run: InversionState,
        dtype: torch.dtype,
        backend: str | None = "inductor",
        pool: Any = None,
    ):
        self.step, self.pool = step, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        device, channels = step.cache.keys_values.device, step.config.token_dim
        self.first, self.num_tokens, self.prefix_length = run.first, run.num_tokens, run.context.prefix_length
        self.position = torch.zeros((), dtype=torch.int64, device=device)  # of the next token's input in the cache
        self.previous = torch.zeros(run.batch, channels, dtype=dtype, device=device)
        #: Noise, tokens and log-scales, (T, B, C) each.
        self.noise, self.x, self.log_scales = (
            torch.zeros(run.num_tokens, run.batch, channels, dtype=dtype, device=device) for _ in range(3)
        )
        #: Of guidance; on the device, so that another weight needs no other graph.
        self.weight = torch.zeros((), dtype=dtype, device=device)
        self.guidance = None if run.guidance is None else replace(run.guidance, weight=self.weight)
        self.function: Callable[[], None] = self.make_token
        if backend is not None:
            own = with_code_of_its_own(self.make_token)
            self.function = torch.compile(own, backend=backend, dynamic=False, fullgraph=True)
        self.captures = device.type == "cuda"

    def make_token(self) -> None:
        """The token at `position`, and on to the next."""
        token = self.position - self.prefix_length + self.first
        place = token.view(1)
        rows = self.previous if self.guidance is None else torch.cat([self.previous, self.previous])
        parameters = self.step.parameters(rows, self.position)
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

    def decode(self, run: InversionState, z: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and results as of `decode_sequential`; the run is the one of `start`."""
        count = z.shape[1]
        self.noise[:count].copy_(z.transpose(0, 1))
        if self.first == 0:
            self.previous.copy_(run.before_first(len(self.previous), self.previous.dtype))
        else:  # token 0 passes unchanged
            self.previous.copy_(z[:, 0])
            self.x[0].copy_(z[:, 0])
            self.log_scales[0].zero_()
        one = self.function if self.graph is None else self.graph.replay
        for _ in range(self.first, count):
            one()
        # Copies, as the next sequence writes to these buffers again.
        x, log_scales = (torch.stack(part[:count].unbind(0), dim=1) for part in (self.x, self.log_scales))
        return x, log_scales


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
            cache = block.new_cache(shape[1], run.cache.capacity, run.cache.keys_values.dtype)
            cache.keys_values.zero_()  # slots behind the mask must be finite
            step = StaticStep(block, run.context, cache, run.temperature)
            if self.pool is None and cache.keys_values.is_cuda:
                self.pool = torch.cuda.graph_pool_handle()
            self.steps[key] = (weights, FastStep(step, run, dtype, self.backend, self.pool))
        fast = self.steps[key][1]
        fast.start(run)
        return fast

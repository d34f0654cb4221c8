"""Attention of a token to a cache that is partly filled: the kernel and its fall-back; whole tokens on the device."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, condition_of, random_images, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tarflow.flows.decoding import fast_step
from tarflow.flows.decoding import step as step_module
from tarflow.flows.decoding.attention import (
    ATTENTION_WAYS,
    AttentionWay,
    attention_ways,
    cached_attention,
    masked_attention,
)
from tarflow.flows.decoding.fast_step import FastStep, FastSteps, fastest
from tarflow.flows.decoding.fused import WAYS, Way, can_be_fused, suits
from tarflow.flows.decoding.method import InversionState
from tarflow.flows.decoding.resident import RESIDENT_WAYS, can_stay
from tarflow.flows.decoding.sampling import generate
from tarflow.flows.decoding.sequential import decode_sequential
from tarflow.flows.decoding.step import StaticStep
from tarflow.flows.layers.guidance import Guidance

TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("position", [0, 5, 11])
def test_slots_behind_the_position_do_not_count(group: int, position: int) -> None:
    cache = torch.randn(2, 2, 2, 12, 16)
    q = torch.randn(2, 3 * 2 * group * 16)[:, : 2 * group * 16]
    found = masked_attention(q, cache, torch.tensor(position))
    seen = cache[:, :, :, : position + 1]
    expected = F.scaled_dot_product_attention(q.reshape(2, 2, group, 16), seen[:, 0], seen[:, 1]).reshape(2, -1)
    torch.testing.assert_close(found, expected)


def test_the_kernel_is_taken_where_it_fits() -> None:
    cuda = torch.device("cuda")
    for device, dtype, size in (
        (torch.device("cpu"), torch.float32, 64),
        (cuda, torch.float64, 64),
        (cuda, torch.bfloat16, 48),
    ):
        assert cached_attention(device, dtype, size) is masked_attention
        assert not attention_ways(device, dtype, size)
    if TRITON:
        assert attention_ways(cuda, torch.bfloat16, 64) == ATTENTION_WAYS
        for way in ATTENTION_WAYS:
            taken = cached_attention(cuda, torch.bfloat16, 64, way)
            assert taken is not masked_attention
            assert taken.keywords == {"elements": way.elements, "warps": way.warps}  # type: ignore[attr-defined]


@pytest.mark.skipif(not TRITON, reason="without Triton")
def test_the_kernels_in_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    worker = ROOT / "tests" / "triton_worker.py"
    done = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "32 cases\n46 layers\n8 programs\n", done.stderr[-3000:]


@pytest.mark.skipif(not TRITON, reason="without Triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_early_kernels_load_weights_before_they_wait(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all that other kernels write after it: the input and the residual."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tarflow.flows.decoding.triton_layer import launch_options, normed_product

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    way = next(way for way in WAYS if way.early == (capability >= 90))
    early = launch_options(way)["early"]
    constants = {"norm_weight_at": None, "norm_bias_at": None, "eps": 0.0, "rows": 1, "width": 256, "padded_width": 256}
    constants |= {"columns": 64, "block": 8, "norm": "none", "activation": "none", "residual": True}
    constants |= {"weights_stay": "", "others_stay": "", "early": early}
    names = normed_product.arg_names
    kinds = {name: "constexpr" if name in constants else "*bf16" for name in names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name not in constants}
    source = ASTSource(normed_product, kinds, {(names.index(name),): each for name, each in constants.items()}, aligned)
    options = {"launch_pdl": True} if early else {}
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    assert ("griddepcontrol" in ptx) == early
    if early:
        begun, waited = ptx.split("griddepcontrol.wait")
        assert "ld.global" not in begun.split("griddepcontrol.launch_dependents")[0]
        assert "ld.global.v4" in begun and "ld.global.v4" not in waited  # the weight: 16 bytes a load
        assert "ld.global.b32" not in begun and "ld.global.b32" in waited  # the input: two numbers a thread
        assert waited.count("ld.global.b16") >= 1  # the residual
        assert "st.global" not in begun and "st.global" in waited


@pytest.mark.skipif(not TRITON, reason="without Triton")
def test_keys_stay_where_they_were_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a program's keys and values are asked for, 16 bytes a load, before anything is exchanged among threads; and
    neither goes through shared memory, only sums do."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tarflow.flows.decoding.triton_attention import attend_to_tile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    way, names = ATTENTION_WAYS[1], attend_to_tile.arg_names
    constants = {"scale": 0.125, "kv_heads": 32, "group": 1, "parts": 9, "size": 64, "part_size": way.elements // 64}
    kinds = {name: "constexpr" if name in constants else "i32" if "stride" in name else "*fp32" for name in names}
    kinds |= {"q_at": "*bf16", "cache_at": "*bf16", "position_at": "*i64"}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name not in constants}
    source = ASTSource(attend_to_tile, kinds, {(names.index(name),): each for name, each in constants.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": way.warps})
    loads = 2 * way.elements // (8 * 32 * way.warps)
    assert made.asm["ptx"].split("shfl")[0].split("bar.sync")[0].count("ld.global.v4") >= loads
    assert made.metadata.shared <= 4 * 64 * way.warps  # a float32 of each lane and warp


@pytest.mark.skipif(not TRITON, reason="without Triton")
@pytest.mark.parametrize("way", RESIDENT_WAYS, ids=lambda way: way.name)
def test_programs_that_stay_ask_for_weights_before_they_wait(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes a load, of each of the four weights of a layer and of the next layer's first. What other programs write is
    read past the first-level cache, which does not see it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tarflow.flows.decoding.triton_resident import all_layers, launch_options

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names, places = all_layers.arg_names, 16384
    block, inner_block = way.elements // 1024, way.elements // 4096
    constants = {"temperature_at": None, "eps": 1e-5, "head_eps": 1e-6, "scale": 0.125, "programs": 132, "rows": 2}
    constants |= {"width": 1024, "padded_width": 1024, "block": block, "inner": 4096, "padded_inner": 4096}
    constants |= {"inner_block": inner_block, "heads": 16, "size": 64, "splits": 4, "padded_splits": 4, "turn": 64}
    constants |= {"norm": "layer", "rotated": True, "qk_normed": True, "tempered": False}
    kinds = {name: "*bf16" if name.endswith("_at") else "i32" for name in names}
    kinds |= dict.fromkeys(("table_at", "position_at"), "*i64") | dict.fromkeys(
        ("sums_at", "most_at", "total_at"), "*fp32"
    )
    kinds |= dict.fromkeys(("arrivals_at", "finished_at"), "*i32") | dict.fromkeys(constants, "constexpr")
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name not in (*constants, "layers")}
    source = ASTSource(all_layers, kinds, {(names.index(name),): each for name, each in constants.items()}, aligned)
    options = {"num_warps": way.warps, **launch_options(way)}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    parts = re.split(r"ld\.global\.gpu\.acquire\S+", made.asm["ptx"])  # twice in each wait
    assert len(parts) == 1 + 2 * 5 and places % way.elements == 0
    loads = way.elements // (8 * 32 * way.warps)
    weights = [len(re.findall(r"ld\.global\.L1::evict_first\.\S*v4", part)) for part in parts]
    # Before each wait the first ones of what follows, after it the next ones; but attention, which follows the second, has
    # none. The next layer's first ones stand at the end or, as a loop may begin with them, at the beginning.
    assert weights[1:-1] == [0, loads + loads, 0, 0, 0, loads + loads, 0, loads + loads, 0]
    assert weights[0] + weights[-1] == 3 * loads
    assert "ld.global.cg" not in parts[0] and all("ld.global.cg" in part for part in parts[2::2])
    assert sum("red" in part or "atom" in part for part in parts) >= 5


class Replayed:
    """Stands for a CUDA graph: each replay writes to the buffers of the first."""

    def __init__(self, step: FastStep):
        self.step = step

    def replay(self) -> None:
        self.step.function()


def replaying(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """As on a CUDA device: all tokens come from replays."""
    graphs: list[Replayed] = []
    initialize = FastStep.__init__

    def initialized(self: FastStep, *rest: Any) -> None:
        initialize(self, *rest)
        self.captures = True

    def capture(self: FastStep) -> None:
        self.graph = Replayed(self)
        graphs.append(self.graph)

    monkeypatch.setattr(FastStep, "__init__", initialized)
    monkeypatch.setattr(FastStep, "capture", capture)
    return graphs


@pytest.mark.parametrize(("weight", "batch"), [(0.0, 3), (1.5, 3), (0.0, 1)])
def test_what_a_graph_writes_again_is_not_kept(monkeypatch: pytest.MonkeyPatch, weight: float, batch: int) -> None:
    """Log-determinants of blocks without guidance were those of the last token, as many times as there are tokens."""
    graphs = replaying(monkeypatch)
    model = small_model(conditioning="class_prefix", condition_blocks="deep")
    cond, null = model.condition(torch.arange(batch), None, batch), model.condition(None, None, batch)
    steps, results = FastSteps(None), []
    for _ in range(2):
        noise = random_images(model, batch)
        expected = generate(model, noise, cond, null, Guidance(weight))
        found = generate(model, noise, cond, null, Guidance(weight), fast=steps)
        results.append((found, expected))
    assert len(graphs) == len(model.blocks)
    for found, expected in results:  # the first ones are still what they were
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_results_are_copies_of_the_buffers(batch: int) -> None:
    model, steps = small_model(sample_size=8), FastSteps(None)

    def decoded() -> tuple[Tensor, Tensor]:
        run = InversionState(model.blocks[0], batch, (4, 4), None, None, None)
        return decode_sequential(run, torch.randn(batch, 16, 8), steps)

    with torch.no_grad():
        first = decoded()
        kept = [part.clone() for part in first]
        decoded()
    assert all(torch.equal(part, copy) for part, copy in zip(first, kept, strict=True))


@pytest.mark.parametrize("order", [None, "coarse_to_fine", "outward"])
@pytest.mark.parametrize("how", [Guidance(1.0), Guidance(1.0, "linear", annealed=True)], ids=["gaussian", "annealed"])
def test_one_graph_serves_all_weights_of_guidance(how: Guidance, order: str | None) -> None:
    model = small_model(conditioning="class_prefix", condition_blocks="deep", deep_order=order).double()
    steps = FastSteps(None)
    cond, null = model.condition(torch.tensor([0, 1]), None, 2), model.condition(None, None, 2)
    noise = random_images(model, 2)
    for weight in (1.0, 3.0):
        guidance = Guidance(weight, how.method, how.parts, how.annealed)
        expected, _ = generate(model, noise, cond, null, guidance)
        torch.testing.assert_close(generate(model, noise, cond, null, guidance, fast=steps)[0], expected)
    assert len(steps.steps) == len(model.blocks)
    generate(model, noise, cond, null, None, fast=steps)
    generate(model, noise, cond, null, Guidance(1.0, "linear", "a"), fast=steps)
    assert len(steps.steps) == len(model.blocks) + 2  # the guided block's other kinds


class Counter(TorchDispatchMode):
    """Counts operations that are more than another view, and those that read a number of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.reads, self.conversions = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not func.is_view and "view" not in func.name()
        self.conversions += func is torch.ops.aten._to_copy.default
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_token_is_made_on_the_device_alone() -> None:
    model = small_model(conditioning="class_prefix", condition_blocks="deep", sample_size=8)
    cond, null = model.condition(torch.tensor([0, 1]), None, 2), model.condition(None, None, 2)
    run = InversionState(model.blocks[-1], 2, (4, 4), cond, null, Guidance(1.0))
    with torch.no_grad():
        step = FastSteps(None).get(run, torch.float32)
        pointers = [step.x.data_ptr(), step.previous.data_ptr(), step.position.data_ptr()]
        with Counter() as counter:
            step.function()
    assert int(step.position) == run.context.prefix_length + 1
    assert pointers == [step.x.data_ptr(), step.previous.data_ptr(), step.position.data_ptr()]
    assert counter.reads == 0
    assert counter.operations < 110  # of two layers, guidance, the affine map, and what is written


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_of_steps_convert_little(norm: str, dtype: torch.dtype) -> None:
    """None for layer normalisation, and the numbers of the module up to rounding."""
    model = small_model(norm=norm, mlp="geglu", qk_norm=True, post_norm=True).to(dtype)
    run = InversionState(model.blocks[-1], 2, (2, 2), None, None, None)
    layer = FastSteps(None).get(run, torch.float32).step.layers[0]
    x = torch.randn(2, 64).to(dtype)
    with torch.no_grad(), Counter() as counter:
        found = layer.mlp_norm(x)
    assert counter.conversions == (2 if (norm, dtype) == ("rms_norm", torch.bfloat16) else 0)
    assert norm == "rms_norm" or counter.operations == 1
    module = model.blocks[-1].layers[0].mlp.norm
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, module(x).detach(), rtol=2 * rounding, atol=rounding)


@pytest.mark.parametrize("fast", [False, True])
def test_an_attention_temperature_in_16_bits(fast: bool) -> None:
    """Queries became float32, and attention with keys in bfloat16 an error."""
    model = small_model(conditioning="class_prefix", sample_size=8)
    cond, null = model.condition(torch.tensor([0, 1]), None, 2), model.condition(None, None, 2)
    noise, how = random_images(model, 2), Guidance(1.0, "linear", temperature=1.7)
    expected, _ = generate(model, noise, cond, null, how)
    model.to(torch.bfloat16)
    found, _ = generate(model, noise, cond, null, how, fast=FastSteps(None) if fast else None)
    assert float((found - expected).square().mean().sqrt()) < 0.1


class OneByOne:
    """Stands for kernels of whole layers."""

    def __init__(self, step: StaticStep, way: Way, off: float = 0.0, error: str = "", unsteady: float = 0.0):
        self.step, self.way, self.off, self.error, self.unsteady, self.calls = step, way, off, error, unsteady, 0

    def __call__(self, hidden: Tensor, position: Tensor) -> Tensor:
        self.calls += 1
        if self.error:
            raise RuntimeError(self.error)
        return self.step.run_layers(hidden, position) + self.off + self.unsteady * (self.calls % 37 == 0)


def deep_run(batch: int = 2, **options: Any) -> InversionState:
    model = small_model(conditioning="class_prefix", condition_blocks="deep", sample_size=8, **options)
    cond, null = model.condition(torch.arange(batch), None, batch), model.condition(None, None, batch)
    return InversionState(model.blocks[-1], batch, (4, 4), cond, null, Guidance(1.0))


def test_of_steps_that_agree_the_fastest_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A faster one that fails, makes other tokens or not always the same is left out, with a warning."""
    now, costs, messages = [0.0], {None: 3.0, 1: 2.0, 2: 1.0, 3: 0.5, 4: 0.1, 5: 0.2}, list[str]()
    monkeypatch.setattr(fast_step, "clock", lambda device: now[0])
    monkeypatch.setattr(fast_step.logger, "warning", messages.append)
    with torch.no_grad():
        run = deep_run()
        step = StaticStep(
            run.block, run.context, run.block.new_cache(4, run.cache.capacity, torch.float32), run.temperature
        )
        step.cache.keys_values.zero_()
        faults: tuple[dict[str, Any], ...] = ({}, {}, {"off": 0.5}, {"error": "no memory"}, {"unsteady": 1e-3})
        ways = [OneByOne(step, Way(f"way {count}", count), **fault) for count, fault in enumerate(faults, 1)]
        steps = [FastStep(step, run, torch.float32, None, None, way) for way in (None, *ways)]
        make_token = FastStep.make_token

        def costly(self: FastStep) -> None:
            now[0] += costs[self.fused and self.fused.way.elements]
            make_token(self)

        for one in steps:
            one.function = types.MethodType(costly, one)
        best = fastest(steps, run)
        assert best is steps[2]
        assert {name: round(each) for name, each in best.trials.items()} == {
            "one by one": 3000,
            "way 1": 2000,
            "way 2": 1000,
        }
    assert len(messages) == 3
    assert "way 3 differ" in messages[0]
    assert "way 4 failed" in messages[1] and "no memory" in messages[1]
    assert "way 5 are not the same each time" in messages[2]


def test_kernels_of_layers_are_one_call_within_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used in sampling as the operations one by one are, and compilers do not look into them."""
    torch.compiler.reset()
    made: list[OneByOne] = []

    ways = [*WAYS, *RESIDENT_WAYS]

    def fake(block: Any, step: StaticStep, way: Way) -> OneByOne:
        made.append(OneByOne(step, way))
        return made[-1]

    monkeypatch.setattr(fast_step, "suits", lambda block, step: True)
    monkeypatch.setattr(fast_step, "ways_on", lambda device: list(WAYS))
    monkeypatch.setattr(fast_step, "FusedLayers", fake)
    monkeypatch.setattr(fast_step, "ResidentLayers", fake)
    monkeypatch.setattr(fast_step, "fastest", lambda steps, run: steps[-1])
    model = small_model(conditioning="class_prefix", condition_blocks="deep", sample_size=8)
    cond, null = model.condition(torch.tensor([0, 1]), None, 2), model.condition(None, None, 2)
    noise, steps = random_images(model, 2), FastSteps("eager")
    expected = generate(model, noise, cond, null, Guidance(1.0))
    found = generate(model, noise, cond, null, Guidance(1.0), fast=steps)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    assert [one.way for one in made] == ways * len(model.blocks)
    assert [one.calls for one in made[len(ways) - 1 :: len(ways)]] == [16] * len(model.blocks)


def test_the_fastest_attention_is_taken_and_only_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that makes other tokens or fails is left out; all ways have one cache."""
    torch.compiler.reset()
    now, messages, compiled = [0.0], list[str](), []
    costs, faults = dict(zip(ATTENTION_WAYS, (3.0, 2.0, 1.0, 0.5), strict=True)), {ATTENTION_WAYS[2]: 0.5}

    def attention(device: Any, dtype: Any, head_dim: int, way: AttentionWay = ATTENTION_WAYS[0]) -> Any:
        def attend(q: Tensor, keys_values: Tensor, position: Tensor) -> Tensor:
            if way is ATTENTION_WAYS[3]:
                raise RuntimeError("no shared memory")
            if not torch.compiler.is_compiling():
                now[0] += costs[way]
            return masked_attention(q, keys_values, position) + faults.get(way, 0.0)

        return attend

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(fast_step, "clock", lambda device: now[0])
    monkeypatch.setattr(fast_step.logger, "warning", messages.append)
    monkeypatch.setattr(step_module, "cached_attention", attention)
    monkeypatch.setattr(step_module, "attention_ways", lambda *kind: ATTENTION_WAYS)
    run = deep_run()
    with torch.no_grad():
        steps = FastSteps(backend)
        taken = steps.get(run, torch.float32)
        assert isinstance(taken, FastStep) and not compiled
        assert taken.name == ATTENTION_WAYS[1].name
        assert list(taken.trials) == [way.name for way in ATTENTION_WAYS[:2]]
        noise = torch.randn(2, 16, run.block.config.token_dim)
        found = taken.decode(run, noise)[0]
        assert len(compiled) == 1
        plain = FastSteps(None).get(run, torch.float32)
        assert isinstance(plain, FastStep) and plain.name == ATTENTION_WAYS[1].name
        expected = decode_sequential(run, noise)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(messages) == 4 and "2 warps failed" in messages[1] and "no shared memory" in messages[1]
    assert f"{ATTENTION_WAYS[2].name} differ" in messages[0]


@pytest.mark.parametrize(
    ("options", "batch"), [({}, 3), ({"post_norm": True}, 1), ({"head_dim": 24, "width": 48}, 1), ({}, 1)]
)
def test_kernels_of_layers_are_for_what_they_can(options: dict[str, Any], batch: int) -> None:
    """Few rows, known norms, and none after a product; and CUDA devices alone."""
    with torch.no_grad():
        run = deep_run(batch, **options)
        step = StaticStep(run.block, run.context, run.cache, run.temperature)
    fits = not options and batch == 1
    assert can_be_fused(list(run.block.layers), 2 * batch, step) == fits
    assert not suits(run.block, step)


@pytest.mark.parametrize("options", [{}, {"mlp": "geglu"}, {"num_kv_heads": 1}, {"norm": "rms_norm"}])
def test_one_kernel_is_for_what_it_can(options: dict[str, Any]) -> None:
    """GELU, a head of keys for each of queries, and weights that begin where 16 bytes do."""
    with torch.no_grad():
        run = deep_run(1, **options)
        step = StaticStep(run.block, run.context, run.cache, run.temperature)
        assert can_stay(run.block, step) == (not options.keys() & {"mlp", "num_kv_heads"})
        up = run.block.layers[0].mlp.up
        up.weight.data = torch.cat([torch.zeros(1), up.weight.flatten()])[1:].view_as(up.weight)
        assert not can_stay(run.block, StaticStep(run.block, run.context, run.cache, run.temperature))


def test_any_number_of_batch_sizes_is_compiled() -> None:
    """The compiler's limit is eight for one piece of code."""
    torch.compiler.reset()
    model, steps = (
        small_model(layers_per_block=[1, 1], conditioning="class_prefix", condition_blocks="deep"),
        FastSteps("eager"),
    )
    for batch in range(1, 6):
        cond = model.condition(condition_of(model, batch)["class_labels"], None, batch)
        null = model.condition(None, None, batch)
        noise = random_images(model, batch)
        expected, _ = generate(model, noise, cond, null, Guidance(1.0))
        found, _ = generate(model, noise, cond, null, Guidance(1.0), fast=steps)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(steps.steps) == 10

"""The five commands of `tarflow benchmark`: measure, print, and write a JSON file and a picture."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from tarflow import TARFlowModel
from tarflow.benchmarks import charts
from tarflow.benchmarks.data import DataPlan, Reading, compare_sources, list_names
from tarflow.benchmarks.exactness import captions_of, exactness, exactness_table
from tarflow.benchmarks.memory import MODES, memory_of, memory_table, training_memory
from tarflow.benchmarks.random_models import random_model, shape_of
from tarflow.benchmarks.sampling import PLAIN, SamplingPlan, Speed, compare, roofline
from tarflow.benchmarks.training import TrainingPlan, best, compare_training, loss_differences
from tarflow.common.files import write_json
from tarflow.common.machine import machine, product_speed
from tarflow.common.progress import announce
from tarflow.flows.layers.guidance import Guidance
from tarflow.pipeline.conversion import DTYPES
from tarflow.pipeline.loading.device import best_device
from tarflow.pipeline.loading.place import title_of
from tarflow.pipeline.opening import load_pipeline


def run(arguments: argparse.Namespace) -> None:
    """Run the command that the arguments of `tarflow.cli.benchmark` name."""
    if arguments.device is None:
        arguments.device = "cpu" if arguments.command in ("memory", "data") else best_device()
    commands = {"sampling": run_sampling, "exactness": run_exactness, "training": run_training, "memory": run_memory}
    commands["data"] = run_data
    commands[arguments.command](arguments)


def header(arguments: argparse.Namespace, **facts: Any) -> dict[str, Any]:
    """What a result belongs to."""
    return {**facts, "machine": machine(torch.device(arguments.device)), "date": time.strftime("%Y-%m-%d")}


def write(arguments: argparse.Namespace, result: dict[str, Any]) -> Path:
    """Write a command's JSON file; returns the path of its picture."""
    path = Path(arguments.output).expanduser() / f"{arguments.command}.json"
    write_json(path, result)
    print(f"\n{path}")
    return path.with_suffix(".png")


def run_sampling(arguments: argparse.Namespace) -> None:
    model, text, level = load(arguments)
    guidance = Guidance(arguments.guidance_scale - 1)
    result = header(
        arguments,
        model=arguments.pipeline or arguments.model,
        trained=arguments.pipeline is not None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        guidance_scale=arguments.guidance_scale,
        repeats=arguments.repeats,
        dtype=arguments.dtype,
        speeds=[],
        roofline=[],
    )
    graphs = ("graphs",) if torch.device(arguments.device).type == "cuda" else ()
    methods = (*PLAIN, *graphs, *(("compiled", "compiled auto") if arguments.compile else ()))
    announce(f"{len(methods)} methods, --repeats {arguments.repeats}: on a CPU that takes minutes, fewer of them less")
    for batch in arguments.batches:
        cond, null = conditions(model, text, batch, level)
        speeds = compare(model, batch, cond, null, guidance, SamplingPlan(methods=methods, repeats=arguments.repeats))
        print(f"\nbatch {batch}        images/s  × published  ms/step  max residual  max difference  methods (sweeps)")
        for speed in speeds:
            told = ", ".join(
                name if count is None else f"{name} ({count})"
                for name, count in zip(speed.methods, speed.sweeps, strict=True)
            )
            print(
                f"  {speed.method:<13} {speed.images_per_second:9.2f} {speed.ratio:12.2f} {speed.step_ms:8.3f} "
                f"{speed.residual_max:13.1e} {speed.difference:15.1e}  {told}"
            )
        rows = roofline(model, batch, cond, null, guidance)
        for row in rows:
            print(f"  block {row.block}: {row.step_ms:.3f} ms a step, {row.share:.0%} of the {row.bound} roof")
        result["speeds"] += [dataclasses.asdict(speed) for speed in speeds]
        result["roofline"] += [dataclasses.asdict(row) for row in rows]
    picture = write(arguments, result)
    charts.sampling_chart([Speed(**speed) for speed in result["speeds"]], result["machine"], picture)


def run_exactness(arguments: argparse.Namespace) -> None:
    rows = []
    for name in arguments.pipelines:
        pipe = load_pipeline(name).to(arguments.device)
        text = pipe if pipe.text_encoder is not None else None
        cond, null = conditions(pipe.flow, text, arguments.samples, pipe.drawing_level)
        method = pipe.config.guidance_method
        options = (method, arguments.guidance_scales, arguments.samples)
        for row in exactness(title_of(name), pipe.flow, cond, null, *options):
            rows.append(row)
            print(f"{row.pipeline:<16} guidance {row.guidance_scale:<5g} {row.largest:9.1e}  {row.method}", flush=True)
    print(f"\n{exactness_table(rows)}")
    kept = [dataclasses.asdict(row) for row in rows]
    write(arguments, header(arguments, samples=arguments.samples, rows=kept))


def load(arguments: argparse.Namespace) -> tuple[TARFlowModel, Any, float | None]:
    """The flow, on its device, what encodes captions for it (None: random conditions), and the level that a flow of many
    noise levels draws at."""
    dtype = DTYPES[arguments.dtype]
    if arguments.pipeline is not None:
        pipe = load_pipeline(arguments.pipeline).to(arguments.device)
        pipe.flow.to(dtype)
        return pipe.flow, pipe if pipe.text_encoder is not None else None, pipe.drawing_level
    return random_model(arguments.model, arguments.device, dtype), None, None


def conditions(model: TARFlowModel, text: Any, batch: int, level: float | None = None) -> tuple[Any, Any]:
    """Different conditions for each sample, and the null condition, as the blocks take them."""
    if model.config.conditioning == "prefix":
        if text is not None:
            prompts = captions_of(text, batch)
            cond, null = text.encode_prompt(prompts, model.device)
        else:
            shape = (batch, 128, model.config.cond_dim)
            cond, null = (torch.randn(shape, device=model.device), torch.zeros(shape, device=model.device))
        cond, null = cond.to(model.dtype), null.to(model.dtype)
        return model.condition(None, cond, batch, level), model.condition(None, null, batch, level)
    labels = None
    if model.config.conditioning != "none":
        labels = torch.arange(batch, device=model.device) % model.config.num_classes
    return model.condition(labels, None, batch, level), model.condition(None, None, batch, level)


def run_training(arguments: argparse.Namespace) -> None:
    shape, device = shape_of(arguments.model), torch.device(arguments.device)
    peaks = {
        name: arguments.peak_tflops * 1e12 if arguments.peak_tflops else product_speed(device, DTYPES[name])
        for name in arguments.precisions
    }
    model, speeds = random_model(arguments.model, arguments.device, torch.float32), []
    plan = TrainingPlan(
        variants=tuple(arguments.variants),
        precisions=tuple(arguments.precisions),
        repeats=arguments.repeats,
        steps=arguments.steps,
    )
    announce(
        f"{len(plan.variants)} variants, --repeats {plan.repeats}: on a CPU that takes minutes, fewer of them less"
    )
    for batch in arguments.batches:
        found = compare_training(model, batch, shape.prefix_length, peaks, plan)
        if device.type == "cpu":
            found = [dataclasses.replace(row, peak_mb=counted(row, shape)) for row in found]
        print(f"\n{charts.training_table(found)}", flush=True)
        speeds += found
    fastest, differences = best(speeds), loss_differences(speeds)
    result = header(
        arguments,
        model=arguments.model,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        repeats=arguments.repeats,
        peak_tflops={name: peak / 1e12 for name, peak in peaks.items()},
        peak_measured=arguments.peak_tflops is None,
        attention_flops="half of the full square, as it is causal",
        memory="counted" if device.type == "cpu" else "measured",
        loss_differences=differences,
        best=fastest and dataclasses.asdict(fastest),
        speeds=[dataclasses.asdict(row) for row in speeds],
    )
    if len(speeds) > len(arguments.batches):  # else there is nothing to differ from
        published = any(row.variant == "published" and row.precision == "float32" for row in speeds)
        whose = "the published float32 one" if published else "that of the table's first row"
        print(f"\nlargest difference of a loss to {whose}: ", end="")
        print(", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    if fastest is not None:
        print(f"fastest: {fastest.variant}, {fastest.precision}, batch {fastest.batch}")
    charts.training_chart(speeds, f"{arguments.model}, {result['machine']}", write(arguments, result))


def run_data(arguments: argparse.Namespace) -> None:
    if arguments.listing:
        listing = list_names(arguments.listing)
        print(
            f"{listing.names:,} names: {listing.seconds:.1f} s, of them {listing.cpu_seconds:.1f} s of the processor, "
            f"{listing.megabytes or 0:.0f} MB"
        )
        write(arguments, header(arguments, listing=dataclasses.asdict(listing)))
        return
    plan = DataPlan(
        pictures=arguments.pictures,
        image_size=arguments.image_size,
        picture_rate=arguments.picture_rate,
        latent_rate=arguments.latent_rate,
        shards=arguments.shards,
        shard_size=arguments.shard_size,
        latent_shape=tuple(arguments.latent_shape),
        latency=arguments.latency_ms / 1e3,
        readers=tuple(arguments.readers),
        batch=arguments.batch,
        seconds=arguments.seconds,
        repeats=arguments.repeats,
    )
    print(f"{'source':<16} readers  items/s  per CPU s  first batch, s  waiting at its rate", flush=True)

    def show(row: Reading) -> None:
        print(
            f"{row.source:<16} {row.readers:7d} {row.items_per_second:8,.0f} {row.per_cpu_second:10,.0f} {row.start:15.2f}  "
            f"{row.waiting:.1%} at {row.rate:,.0f}",
            flush=True,
        )

    rows = compare_sources(plan, tuple(arguments.sources), show)
    kept = [dataclasses.asdict(row) for row in rows]
    write(arguments, header(arguments, plan=dataclasses.asdict(plan), rows=kept))


def counted(row: Any, shape: Any) -> float | None:
    """Megabytes of a variant's step; None for compiled ones, which cannot be counted."""
    mode = "none" if row.variant in ("published", "eager") else row.variant
    if mode not in MODES:
        return None
    published = row.variant == "published"
    return training_memory(shape.arguments, row.batch, shape.prefix_length, row.precision, mode, published).peak / 2**20


def run_memory(arguments: argparse.Namespace) -> None:
    facts = {"precision": arguments.precision, "batch": arguments.batch}
    if arguments.model is not None:
        modes = memory_of(arguments.model, arguments.batch, arguments.precision, arguments.device)
        print(
            f"{charts.memory_parts_text(modes)}\nParts are largest at different times, so the peak is below their sum."
        )
        averaged = modes["none"].parameters / 2**30
        print(f"Averaged weights (train.ema_decay above 0) take another {averaged:.4g} GiB.")
        parts = {mode: dataclasses.asdict(memory) for mode, memory in modes.items()}
        write(arguments, header(arguments, model=arguments.model, **facts, modes=parts))
        return
    model = {"in_channels": 4, "sample_size": arguments.sample_size, "width": arguments.width}
    rows = memory_table(model, arguments.blocks, arguments.layers, arguments.batch, arguments.precision)
    print(f"activations, MiB\n{charts.memory_table_text(rows)}")
    plain = [
        {**row, "modes": {mode: dataclasses.asdict(memory) for mode, memory in row["modes"].items()}} for row in rows
    ]
    title = (
        f"width {arguments.width}, {arguments.sample_size**2} tokens, batch {arguments.batch}, {arguments.precision}"
    )
    charts.memory_chart(rows, title, write(arguments, header(arguments, **facts, model=model, rows=plain)))

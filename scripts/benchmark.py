"""Measure speed on this machine.

    python scripts/benchmark.py sampling --pipeline runs/quickstart/pipeline --batches 1 16 --output runs/benchmark
    python scripts/benchmark.py sampling --model starflow_imagenet256 --dtype bfloat16 --batches 1 16

``sampling`` compares the decoding methods with the published algorithm (every block token by token, the cached keys
rotated again at each step, eager), all in one run and in turn, on the same noise, weights and precision. Trained
weights matter: on them depends how many sweeps the Jacobi methods need. It writes sampling.json and sampling.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.evaluation.sampling_speed import METHODS, Speed, compare, random_model, roofline
from tarflow.flows.guidance import Guidance
from tarflow.pipeline.conversion import DTYPES
from tarflow.pipeline.device import best_device
from tarflow.training.arguments import fail


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sampling = commands.add_parser("sampling", help="decoding methods side by side")
    source = sampling.add_mutually_exclusive_group(required=True)
    source.add_argument("--pipeline", help="folder or hub id of trained weights")
    source.add_argument("--model", help="a configuration's name in configs/, with random weights")
    sampling.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    sampling.add_argument("--guidance-scale", type=float, default=2.0)
    sampling.add_argument("--repeats", type=int, default=5)
    sampling.add_argument("--dtype", choices=DTYPES, default="float32")
    sampling.add_argument("--compile", action="store_true", help="also with compiled steps (and CUDA graphs)")
    sampling.add_argument("--device", default=best_device())
    sampling.add_argument("--output", default="runs/benchmark", help="folder of sampling.json and sampling.png")
    arguments = parser.parse_args(argv)
    try:
        run_sampling(arguments)
    except (ValueError, OSError) as error:
        fail(error)


def run_sampling(arguments: argparse.Namespace) -> None:
    model, text = load(arguments)
    guidance = Guidance(arguments.guidance_scale - 1)
    result: dict[str, Any] = {
        "model": arguments.pipeline or arguments.model,
        "trained": arguments.pipeline is not None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "guidance_scale": arguments.guidance_scale,
        "repeats": arguments.repeats,
        "machine": machine(torch.device(arguments.device)),
        "dtype": arguments.dtype,
        "date": time.strftime("%Y-%m-%d"),
        "speeds": [],
        "roofline": [],
    }
    for batch in arguments.batches:
        cond, null = conditions(model, text, batch)
        speeds = compare(model, batch, cond, null, guidance, arguments.repeats, arguments.compile)
        print(f"\nbatch {batch}        images/s  × published  ms/step  max residual  max difference  methods (sweeps)")
        for speed in speeds:
            methods = ", ".join(
                name if count is None else f"{name} ({count})"
                for name, count in zip(speed.methods, speed.sweeps, strict=True)
            )
            print(
                f"  {speed.method:<12} {speed.images_per_second:9.2f} {speed.ratio:12.2f} {speed.step_ms:8.3f} "
                f"{speed.residual_max:13.1e} {speed.difference:15.1e}  {methods}"
            )
        rows = roofline(model, batch, cond, null, guidance)
        for row in rows:
            print(f"  block {row.block}: {row.step_ms:.3f} ms a step, {row.share:.0%} of the {row.bound} roof")
        result["speeds"] += [dataclasses.asdict(speed) for speed in speeds]
        result["roofline"] += [dataclasses.asdict(row) for row in rows]
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sampling.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    chart([Speed(**speed) for speed in result["speeds"]], result["machine"], folder / "sampling.png")
    print(f"\n{folder / 'sampling.json'}\n{folder / 'sampling.png'}")


def load(arguments: argparse.Namespace) -> tuple[TARFlowModel, Any]:
    """The flow, on its device, and what encodes captions for it (None: random conditions)."""
    dtype = DTYPES[arguments.dtype]
    if arguments.pipeline is not None:
        pipe = TARFlowPipeline.from_pretrained(arguments.pipeline).to(arguments.device)
        pipe.flow.to(dtype)
        return pipe.flow, pipe if pipe.text_encoder is not None else None
    return random_model(arguments.model, arguments.device, dtype), None


def conditions(model: TARFlowModel, text: Any, batch: int) -> tuple[Any, Any]:
    """Different conditions for each sample, and the null condition, as the blocks take them."""
    if model.config.conditioning == "prefix":
        if text is not None:
            shapes = ("circle", "square", "triangle", "star", "ring", "cross")
            prompts = [f"a {('small', 'large')[i % 2]} red {shapes[i % 6]} on a dark background" for i in range(batch)]
            cond, null = text.encode_prompt(prompts, None, model.device)
        else:
            shape = (batch, 128, model.config.cond_dim)
            cond, null = (torch.randn(shape, device=model.device), torch.zeros(shape, device=model.device))
        return cond.to(model.dtype), null.to(model.dtype)
    labels = None
    if model.config.conditioning != "none":
        labels = torch.arange(batch, device=model.device) % model.config.num_classes
    return model.condition(labels, None, batch), model.condition(None, None, batch)


def machine(device: torch.device) -> str:
    """What the numbers belong to."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def chart(speeds: list[Speed], title: str, path: Path) -> None:
    """Bars of images per second, grouped by batch size, with the ratio to the published algorithm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({speed.batch for speed in speeds})
    figure, axes = pyplot.subplots(1, len(batches), figsize=(4 * len(batches), 3.2), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        rows = {speed.method: speed for speed in speeds if speed.batch == batch}
        names = [name for name in METHODS if name in rows]
        bars = axis.bar(names, [rows[name].images_per_second for name in names])
        axis.bar_label(bars, [f"{rows[name].ratio:.1f}×" for name in names])
        axis.set(title=f"batch {batch}", ylabel="images per second")
        axis.tick_params(axis="x", rotation=30)
        axis.margins(y=0.12)  # room for the labels
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

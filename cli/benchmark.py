"""`tarflow benchmark`: speed and memory on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from tarflow import configs
from tarflow.benchmarks.choices import DATA_SOURCES, PRECISIONS, SAMPLES, SCALES, VARIANTS
from tarflow.cli.parsing import CommandParser, loading
from tarflow.common.charts import check_matplotlib
from tarflow.common.checks import at_least, positive
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.models import shipped
from tarflow.pipeline.loading.place import locate

DESCRIPTION = """Measure speed and memory on this machine.

  tarflow benchmark sampling --pipeline runs/quickstart/pipeline --batches 1 16
  tarflow benchmark sampling --model starflow_imagenet256 --dtype bfloat16 --batches 1 16
  tarflow benchmark exactness --pipelines emoji drawings_text drawings_class
  tarflow benchmark training --model quickstart_class --batches 16
  tarflow benchmark training --model starflow_imagenet256 --precisions bfloat16 \\
      --batches 8 16 32 64 --peak-tflops 790
  tarflow benchmark memory
  tarflow benchmark memory --model starflow_imagenet256 --batch 8
  tarflow benchmark data --readers 0 1 2
  tarflow benchmark data --listing 1000000

sampling compares the decoding methods with the published algorithm (every block token by token, the cached keys
rotated again at each step, eager), all in one run and in turn, on the same noise, weights and precision. Trained
weights matter: on them depends how many sweeps the Jacobi methods need.

exactness decodes the same noise by all methods at several guidance scales, and says how far the latents are from
those of sequential decoding in float64.

training compares ways of taking a step of training with the published one, in turn and from the same weights, on
random data of the configuration's shape. Utilization is what the mathematics needs, causal attention counted as half of
the full square and nothing computed again, over the machine's peak.

memory counts the bytes of a step of training; it needs neither a GPU nor the memory: of the published models with
--model, else activations against the number of equal blocks and of layers in them.

data reads made-up pictures and latents as training does, from each kind of source and by several numbers of readers, and
says how many come a second, and which share of its time a training that takes so many a second waits for them. "latents
memory" and "latents http" are read through fsspec with room for a part of the cache; a web server on this machine answers
late. --listing opens a folder of so many empty files instead.

Each writes a JSON file of its name, and a picture where there is something to see."""


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    with ending():
        check_numbers(arguments)
        check_writable(arguments.output, folder=True)
        check_matplotlib()
        check_sources(arguments)
        loading()
        from tarflow.benchmarks.runs import run  # imported here, as it takes seconds

        run(arguments)


def parser() -> CommandParser:
    parser = CommandParser("tarflow benchmark", DESCRIPTION, "COMMAND")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog="tarflow benchmark")
    sampling = add_command(
        commands, "sampling", "decoding methods side by side", "--pipeline runs/quickstart/pipeline --batches 1 16"
    )
    source = sampling.add_mutually_exclusive_group(required=True)
    source.add_argument("--pipeline", help="trained weights: folder, shipped name or hub id")
    source.add_argument("--model", help="the name of a configuration (tarflow configs), with random weights")
    sampling.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images at once, each measured")
    sampling.add_argument("--guidance-scale", type=float, default=2.0, help="1 is off")
    sampling.add_argument("--repeats", type=int, default=5, help="how often each is measured, in turns")
    help_text = "of the weights"
    sampling.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help=help_text)
    sampling.add_argument("--compile", action="store_true", help="also with compiled steps (and CUDA graphs)")

    exact = add_command(
        commands,
        "exactness",
        "how far each decoding method is from exact decoding",
        "--pipelines emoji drawings_text drawings_class",
    )
    exact.add_argument("--pipelines", nargs="+", default=list(shipped()), help="names, folders or hub ids")
    exact.add_argument("--guidance-scales", type=float, nargs="+", default=list(SCALES), help="1 is off")
    exact.add_argument("--samples", type=int, default=SAMPLES, help="decoded at each scale")

    training = add_command(
        commands, "training", "steps of training side by side", "--model quickstart_class --batches 16"
    )
    training.add_argument("--model", default="quickstart_class", help="the name of a configuration (tarflow configs)")
    training.add_argument("--batches", type=int, nargs="+", default=[16], help="pictures of a step, each measured")
    help_text = f"{', '.join(VARIANTS)}, compiled+layer, compiled+block"
    training.add_argument("--variants", nargs="+", default=list(VARIANTS), help=help_text)
    help_text = "float32, and bfloat16 for float32 weights under autocast"
    training.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help=help_text)
    training.add_argument("--repeats", type=int, default=5, help="how often each is measured, in turns")
    training.add_argument("--steps", type=int, default=5, help="timed in each repeat, after one that is not")
    training.add_argument("--peak-tflops", type=float, help="of the machine; else that of a large matrix product")

    memory = add_command(commands, "memory", "memory of a step of training", "--model starflow_imagenet256 --batch 8")
    memory.add_argument(
        "--model", help="the name of a configuration (tarflow configs); without it a table of equal blocks"
    )
    memory.add_argument("--batch", type=int, default=8, help="pictures of a step")
    help_text = "float32, or bfloat16 for float32 weights under autocast"
    memory.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help=help_text)
    memory.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8, 16], help="of the table")
    memory.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8], help="of a block in the table")
    memory.add_argument("--width", type=int, default=512, help="numbers of a token in the table")
    memory.add_argument("--sample-size", type=int, default=32, help="side of the latents, of which each is a token")

    data = add_command(commands, "data", "how fast data is read", "--readers 0 1 2")
    sources, help_text = list(DATA_SOURCES), f"some of {', '.join(DATA_SOURCES)}"
    data.add_argument("--sources", nargs="+", choices=DATA_SOURCES, default=sources, metavar="SOURCE", help=help_text)
    data.add_argument("--readers", type=int, nargs="+", default=[0, 1, 2], help="reading processes, of streams threads")
    data.add_argument("--batch", type=int, default=256, help="pictures or latents of a step")
    data.add_argument("--pictures", type=int, default=2000, help="in each source that is made up")
    data.add_argument("--image-size", type=int, default=256, help="side of the pictures in pixels")
    data.add_argument("--picture-rate", type=float, default=1000, help="pictures a second that training takes")
    data.add_argument("--latent-rate", type=float, default=20_000, help="latents a second that training takes")
    data.add_argument("--latent-shape", type=int, nargs=3, default=[4, 32, 32], help="channels, height and width")
    data.add_argument("--shards", type=int, default=32, help="of the cache")
    data.add_argument("--shard-size", type=int, default=1024, help="latents of a shard")
    data.add_argument("--latency-ms", type=float, default=20, help="of the web server")
    data.add_argument("--seconds", type=float, default=4, help="of each measurement, twice")
    data.add_argument("--repeats", type=int, default=3, help="how often each is measured, in turns")
    data.add_argument("--listing", type=int, help="open a folder of so many empty files instead")

    for command in commands.choices.values():
        command.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is; cpu for memory)")
        command.add_argument("--output", default="runs/benchmark", help="folder of the JSON file and the picture")
    return parser


def add_command(commands: Any, name: str, what: str, example: str) -> argparse.ArgumentParser:
    """A parser of one of ``commands``, whose help has an example.

    Args:
        what: it measures.
        example: options.
    """
    return commands.add_parser(name, help=what, description=f"{what}\n\n  tarflow benchmark {name} {example}")


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse counts and scales below 1.

    Raises:
        ValueError: that names the option.
    """
    at_least(0).check("--readers", getattr(arguments, "readers", None))
    for name in ("picture_rate", "latent_rate", "seconds"):
        positive.check(f"--{name.replace('_', '-')}", getattr(arguments, name, None))
    at_least(0).check("--latency-ms", getattr(arguments, "latency_ms", None))
    of_data = ("pictures", "image_size", "latent_shape", "shards", "shard_size", "listing")
    positive.check("--peak-tflops", getattr(arguments, "peak_tflops", None))
    at_least(1, "(off)").check("--guidance-scale", getattr(arguments, "guidance_scale", None))
    counts = (*of_data, "batches", "repeats", "steps", "batch", "blocks", "layers", "width", "sample_size", "samples")
    for name in (*counts, "guidance_scales"):
        at_least(1, "(off)" if name == "guidance_scales" else "").check(
            f"--{name.replace('_', '-')}", getattr(arguments, name, None)
        )


def check_sources(arguments: argparse.Namespace) -> None:
    """Refuse pipelines and configurations that are not there.

    Raises:
        ValueError: that names the first.
    """
    for name in ("pipeline", "pipelines"):
        for pipeline in as_list(getattr(arguments, name, None)):
            locate(pipeline)
    for model in as_list(getattr(arguments, "model", None)):
        configs.resolve(model)


def as_list(value: str | list[str] | None) -> list[str]:
    """One, several or none."""
    return [value] if isinstance(value, str) else value or []

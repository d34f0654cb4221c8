"""FID and its relatives: reference statistics, samples, and the numbers between them.

    tarflow evaluate fid ref --data pictures.zip --out stats
    tarflow evaluate fid gen --pipeline runs/NAME/pipeline --num 50000 --out samples
    tarflow evaluate fid calc --ref stats --samples samples
    tarflow evaluate fid run --config fid_example

ref computes the reference statistics of pictures, gen draws samples of a pipeline, calc compares the two; run does all
three. With `accelerate launch -m tarflow.cli evaluate fid …` they run on several processes, with the same result.
Inception's weights are downloaded unless --inception-weights names them; another extractor (--extractor NAME
--extractor-weights PATH) gives Fréchet distances that are never called FID.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from tarflow.cli.parsing import with_config_file
from tarflow.common.arguments import parse_dataclass
from tarflow.common.checks import AtLeastOne, at_least, check_ranges
from tarflow.common.command import ending
from tarflow.common.files import check_writable, write_json
from tarflow.data.config import DataConfig
from tarflow.evaluation.features.extractors import Extractor, load_extractor
from tarflow.evaluation.features.names import INCEPTION, KEPT_FEATURES, Metric
from tarflow.evaluation.features.settings import RequiredExtractor
from tarflow.evaluation.images.sets import open_images
from tarflow.evaluation.reports.fid import Comparison, evaluate, reference_statistics, table
from tarflow.evaluation.samples.generation import GenerationConfig, generate_images
from tarflow.training.loop.parallel import TIMEOUT, processes_on_cpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractorConfig(RequiredExtractor):
    """Which features pictures are compared by.

    Attributes:
        inception_weights: torch-fidelity's file of Inception's weights; without it they are downloaded.
        batch_size: pictures per pass and process.
    """

    inception_weights: str | None = None
    batch_size: AtLeastOne = 64

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.inception_weights and self.extractor != INCEPTION:
            raise ValueError(f"inception_weights are given, but the extractor is {self.extractor!r}")
        if self.extractor_weights and self.inception_weights:
            raise ValueError("give Inception's weights once: inception_weights or extractor_weights")

    def load_extractor(self, device: str | torch.device) -> Extractor:
        weights = self.inception_weights or self.extractor_weights
        return load_extractor(self.extractor, weights, device, self.extractor_normalize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceConfig(ExtractorConfig):
    """What samples are compared with.

    Attributes:
        data: a folder, zip archive or .npz of pictures; or a data section (``--data.source …``).
        split: "train" or "validation"; None takes all pictures of a path, or a data section's training split.
        image_size: side to which the pictures of a path are resized and cropped; None wants pictures of one size.
        num: the first so many pictures; None takes all. Drawings, which have no end, need it.
        keep_features: of how many pictures, lying evenly in the set, features are kept for all metrics but the Fréchet
            distance.
    """

    data: str | DataConfig
    split: str | None = None
    image_size: AtLeastOne | None = None
    num: Annotated[int, at_least(2)] | None = None
    keep_features: Annotated[int, at_least(0)] = KEPT_FEATURES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig(ExtractorConfig):
    """What to compute.

    Attributes:
        metrics: of "frechet", "kernel" (KID), "precision_recall" and "inception_score"; None takes all that there are.
        clip: folder or hub id of a CLIP model; adds the CLIP score of the samples' captions.
        match: add the shares of drawings that are what their caption or class says.
        out: JSON file of the result; None writes ``metrics.json`` into the samples' folder.
    """

    metrics: list[Metric] | None = None
    clip: str | None = None
    match: bool = False
    out: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefConfig(ReferenceConfig):
    """Reference statistics.

    Attributes:
        out: folder to write.
    """

    out: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalcConfig(MetricsConfig):
    """Numbers of samples.

    Attributes:
        ref: a folder that ``ref`` wrote, or pictures.
        samples: a folder that ``gen`` wrote, or any other folder, zip archive or .npz of pictures.
        image_size: side to fit pictures to that are not of one size.
        cache_dir: keep statistics of pictures there, and take them from there.
    """

    ref: str
    samples: str
    image_size: AtLeastOne | None = None
    cache_dir: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(ReferenceConfig, MetricsConfig):
    """All three.

    Attributes:
        stats: folder for the reference statistics, which are reused.
        gen: what to generate; unfinished folders are continued.
    """

    stats: str
    gen: GenerationConfig


def ref(config: RefConfig, state: PartialState) -> None:
    check_writable(config.out, folder=True)
    extractor = config.load_extractor(state.device)
    images = open_images(config.data, config.split, config.image_size, config.num)
    found, computed = reference_statistics(images, extractor, config.out, config.batch_size, config.keep_features)
    if state.is_main_process:
        print(f"{found.count} pictures of {found.source}: {'computed' if computed else 'already there'}, {config.out}")
        for note in found.notes:
            print(f"note: {note}")


def gen(config: GenerationConfig, state: PartialState) -> None:
    result = generate_images(
        config, state.process_index, state.num_processes, state.device, wait=state.wait_for_everyone
    )
    state.wait_for_everyone()  # until the first process has put the files in order
    if state.is_main_process:
        speed = result["images_per_second"]
        print(f"{result['num']} images in {result['out']}" + (f", {speed:.3g} a second and process" if speed else ""))


def calc(config: CalcConfig, state: PartialState) -> None:
    out = config.out or default_output(config.samples)
    check_writable(out)
    if config.cache_dir is not None:
        check_writable(config.cache_dir, folder=True)
    names = [field.name for field in dataclasses.fields(Comparison)]
    wanted = Comparison(**{name: getattr(config, name) for name in names})
    report = evaluate(config.ref, config.samples, config.load_extractor(state.device), wanted)
    if state.is_main_process:
        print(table(report), flush=True)  # first: what is printed is not lost
        write_json(out, report | {"settings": dataclasses.asdict(config)}, nan_as_null=True)


def run(config: RunConfig, state: PartialState) -> None:
    check_writable(config.gen.out, folder=True)
    if config.out is not None:
        check_writable(config.out)
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(ExtractorConfig)}
    of_ref = ("data", "split", "image_size", "num", "keep_features")
    ref(RefConfig(**shared, **{name: getattr(config, name) for name in of_ref}, out=config.stats), state)
    gen(config.gen, state)
    wanted = {name: getattr(config, name) for name in ("metrics", "clip", "match", "out")}
    calc(CalcConfig(**shared, **wanted, ref=config.stats, samples=config.gen.out), state)


COMMANDS: dict[str, tuple[Callable[[Any, PartialState], None], type]] = {
    "ref": (ref, RefConfig),
    "gen": (gen, GenerationConfig),
    "calc": (calc, CalcConfig),
    "run": (run, RunConfig),
}


def main(argv: list[str] | None = None, prog: str = "tarflow evaluate fid", description: str | None = __doc__) -> None:
    """Run one of `COMMANDS`; errors end as `ending` says.

    Args:
        argv: the command and its settings; None takes those of the command line.
        prog, description: how the help calls this, and what it says of it.
    """
    argv = sys.argv[1:] if argv is None else argv
    with ending():
        if argv and argv[0] in ("-h", "--help"):
            print(f"{description}\n{prog} {{{','.join(COMMANDS)}}} --help lists the settings of each.")
            return
        if not argv or argv[0] not in COMMANDS:
            raise ValueError(f"expected a command of {', '.join(COMMANDS)} first, got {argv[0] if argv else 'nothing'}")
        command, kind = COMMANDS[argv[0]]
        settings = with_config_file(underscored(argv[1:]))
        config, _ = parse_dataclass(kind, settings, description, f"{prog} {argv[0]}")
        cpu = processes_on_cpus() or parse_flag_from_env("ACCELERATE_USE_CPU")
        command(config, PartialState(cpu=cpu, timeout=TIMEOUT))


def underscored(argv: list[str]) -> list[str]:
    """Options with dashes as the parser knows them, ``--inception-weights`` as ``--inception_weights``.

    Raises:
        ValueError: for a path and a section of the same data, of which the parser would forget the path.
    """
    found = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        found.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if argument.startswith("--") else argument)
    names = {argument.partition("=")[0] for argument in found}
    if "--data" in names and any(name.startswith("--data.") for name in names):
        raise ValueError(
            "give --data PATH or a section --data.source …, not both; --image_size fits pictures of a path"
        )
    return found


def default_output(samples: str) -> Path:
    """``metrics.json`` inside the samples' folder, or beside their file."""
    path = Path(samples).expanduser()
    return path / "metrics.json" if path.is_dir() else path.with_name(f"{path.name}.metrics.json")

"""The steps of `tarflow evaluate fid`, each on one process or several."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from accelerate import PartialState

from tarflow.cli.fid_settings import CalcConfig, ExtractorConfig, RefConfig, RunConfig
from tarflow.common.files import check_writable, write_json
from tarflow.common.words import rounded
from tarflow.evaluation.images.sets import open_images
from tarflow.evaluation.reports.fid import Comparison, evaluate, reference_statistics, table
from tarflow.evaluation.samples.generation import generate_images
from tarflow.evaluation.samples.settings import GenerationConfig


def ref(config: RefConfig, state: PartialState) -> None:
    check_writable(config.out, folder=True)
    images = open_images(config.data, config.split, config.image_size, config.num)  # first: weights may be downloaded
    extractor = config.load_extractor(state.device)
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
        print(
            f"{result['num']} images in {result['out']}"
            + (f", {rounded(speed, 3)} a second and process" if speed else "")
        )


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


def default_output(samples: str) -> Path:
    """``metrics.json`` inside the samples' folder, or beside their file."""
    path = Path(samples).expanduser()
    return path / "metrics.json" if path.is_dir() else path.with_name(f"{path.name}.metrics.json")

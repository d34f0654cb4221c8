"""The comparison: train, draw, measure, time in turns, and write a table and grids."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tarflow.common.charts import markdown_table
from tarflow.common.files import (
    check_writable,
    keep_settings,
    read_json,
    read_json_lines,
    write_json,
    write_picture,
    write_text,
)
from tarflow.common.machine import machine
from tarflow.data.drawing_checker import class_shares, match_shares
from tarflow.data.drawings import CLASS_NAMES, all_captions
from tarflow.data.images import Images
from tarflow.data.subset import evenly
from tarflow.evaluation.features.caption_ranks import caption_score, without
from tarflow.evaluation.features.metrics import calculate
from tarflow.evaluation.images.sets import DataImages, FileImages
from tarflow.evaluation.samples.match import captioned_grid
from tarflow.experiments.peers.drawing import DiffusionDrawer, Drawer, FlowDrawer
from tarflow.experiments.peers.runs import Trainings
from tarflow.experiments.peers.settings import PeersComparison
from tarflow.experiments.peers.timing import fitting_steps, picture_seconds, step_seconds
from tarflow.pipeline.call.choices import STUDENT

#: Samples in a grid; noises that go to latents and back.
SHOWN, TRIPS = 24, 8
#: What decides the trainings: another value wants another folder.
DECIDE = ("data", "condition", "recipe", "steps", "seconds", "pictures", "held_out", "small", "seed")
#: What decides the scores of a row: with another value it is drawn and measured anew.
SCORED = ("num", "extractor", "extractor_weights", "extractor_normalize", "caption_model", "remove")
TITLES = {
    "flow_muon": "flow, Muon",
    "flow_adamw": "flow, AdamW",
    "student": "student of the flow",
    "dit_muon": "DiT, Muon",
    "dit_adamw": "DiT, AdamW",
}
#: Columns of the table: names in the JSON file, and what they are called.
COLUMNS = {
    "title": "",
    "guidance": "guidance",
    "parameters": "parameters",
    "steps": "steps",
    "step_seconds": "seconds a step",
    "match_all": "right",
    "match_error": "±",
    "frechet_distance": "Fréchet distance",
    "caption_first": "caption first of 100",
    "caption_error": "±",
    "nats": "held-out nats",
    "picture_seconds": "seconds a picture",
    "round_trip": "round trip",
}


def check_student(config: PeersComparison) -> None:
    """An error if the student that is there already was trained for weaker guidance, before other rows are measured.

    Raises:
        ValueError: that says up to which.
    """
    path = Path(config.output).expanduser() / "student/pipeline/student/config.json"
    if "student" not in config.train or not path.is_file():
        return
    largest = read_json(path)["max_guidance_scale"]
    if config.guidance_scale > largest:
        raise ValueError(
            f"guidance_scale is {config.guidance_scale:g}, but the student in {config.output!r} was trained with scales up to "
            f"{largest:g}: give one of these, another output, or --train without the student"
        )


@torch.no_grad()
def compare_peers(config: PeersComparison) -> list[dict[str, Any]]:
    """Train what is not trained yet, measure what is not measured, and write ``peers.md``, ``peers.json`` and grids.

    Returns:
        the rows of the table, by the names of `COLUMNS`.

    Raises:
        ValueError: if settings and data do not fit, or the folder has a comparison of other settings.
    """
    folder = Path(config.output).expanduser()
    check_writable(folder, folder=True)
    values = conditions(config)
    check_scores(config, values)
    check_student(config)
    trainings, settings = Trainings(config), dataclasses.asdict(config)
    keep_settings(folder / "settings.json", {name: settings[name] for name in DECIDE}, "a comparison")
    trainings.make_cache()
    rows: list[dict[str, Any]] = []
    drawers: dict[str, Callable[[], Drawer]] = {}
    for name in config.train:
        with torch.enable_grad():
            if config.seconds is not None:
                trainings.fitting[name] = fitting_steps(trainings, name, config.seconds, config.repeats)
            trained = trainings.train(name)
        for key, about, open_drawer in ways(config, trainings, name):
            drawers[key] = open_drawer
            facts = {"key": key, "trained": name, **about, "parameters": trained["parameters"]}
            facts |= {"nats": trained.get("latent_nats_per_dim"), "steps": trainings.fitting.get(name)}
            rows.append(measured_row(config, facts, open_drawer, values))
            write_tables(config, rows)
    pictures = picture_seconds({key: make() for key, make in drawers.items()}, values, config.repeats)
    with torch.enable_grad():
        steps = step_seconds(trainings, config.train, config.repeats)
    for row in rows:
        row |= {"picture_seconds": pictures[row["key"]], "step_seconds": steps[row["trained"]]}
    write_tables(config, rows)
    return rows


def conditions(config: PeersComparison) -> list[Any]:
    """Captions or class labels of the samples: all of drawings in turn, else those of held-out pictures."""
    if config.data.source == "drawings":
        known: list[Any] = all_captions() if config.condition == "caption" else list(range(len(CLASS_NAMES)))
        return list(islice(cycle(known), config.num))
    held_out = Images(config.data, "validation")
    if not len(held_out):
        raise ValueError("nothing of the data is held out: set data.validation_fraction")
    if config.condition == "caption":
        if not held_out.has_captions:
            raise ValueError("the condition is 'caption', but the data have no captions")
        texts = [held_out.caption(index) or "" for index in evenly(len(held_out), min(config.num, len(held_out)))]
        return list(islice(cycle(texts), config.num))
    if not held_out.class_names:
        raise ValueError("the condition is 'class', but the data have no classes")
    return list(islice(cycle(range(len(held_out.class_names))), config.num))


def check_scores(config: PeersComparison, values: list[Any]) -> None:
    """Refuse, before anything is trained, scores that cannot be had."""
    if config.caption_model is not None and (known := len(set(without(values, config.remove)))) < 100:
        raise ValueError(
            f"the caption score chooses among 100 captions, but there are {known}: raise num, or leave caption_model out"
        )


def ways(
    config: PeersComparison, trainings: Trainings, name: str
) -> list[tuple[str, dict[str, Any], Callable[[], Drawer]]]:
    """The rows of what was trained: key, facts, and what opens the drawer."""
    folder, scale, title = trainings.folder / name / "pipeline", config.guidance_scale, TITLES[name]
    if not name.startswith("dit"):
        decoding = STUDENT if name == "student" else "sequential"
        about = {"title": title, "guidance": scale}
        return [(f"{name}_{scale:g}", about, lambda: FlowDrawer(folder, config.condition, scale, decoding))]
    found: list[tuple[str, dict[str, Any], Callable[[], Drawer]]] = []
    settings = trainings.diffusion(name)
    for guidance in config.diffusion_guidance:
        for steps in config.diffusion_steps:
            about = {"title": f"{title}, {steps} steps", "guidance": guidance}

            def opened(guidance: float = guidance, steps: int = steps) -> Drawer:
                return DiffusionDrawer(settings, guidance, steps)

            found.append((f"{name}_{steps}_{guidance:g}", about, opened))
    return found


def measured_row(
    config: PeersComparison, facts: dict[str, Any], open_drawer: Callable[[], Drawer], values: list[Any]
) -> dict[str, Any]:
    """A row with its scores: what ``rows.jsonl`` has of the same settings, or else measured and written there."""
    folder = Path(config.output).expanduser()
    path, wanted = folder / "rows.jsonl", {name: getattr(config, name) for name in SCORED}
    before = [row for _, row in read_json_lines(path)] if path.is_file() else []
    for row in before:
        if row["key"] == facts["key"] and row["scored"] == wanted:
            return {**row}
    drawer = open_drawer()
    images = drawer.draw(values, config.seed)
    row = {**facts, "scored": wanted, **scores(config, images, values, folder / "samples" / facts["key"])}
    row["round_trip"] = drawer.round_trip(values[:TRIPS])
    shown = (
        images[:SHOWN],
        [
            CLASS_NAMES[value] if config.data.source == "drawings" and isinstance(value, int) else str(value)
            for value in values[:SHOWN]
        ],
    )
    write_picture(folder / f"{facts['key']}.png", captioned_grid(*shown))
    kept = [row for row in before if row["key"] != facts["key"]]
    write_text(path, "".join(f"{json.dumps(one)}\n" for one in [*kept, row]))
    return row


def scores(config: PeersComparison, images: list[Image.Image], values: list[Any], folder: Path) -> dict[str, Any]:
    """Of drawings the share that is right; with an extractor the distance; with a caption model its score."""
    found: dict[str, Any] = {}
    if config.data.source == "drawings":
        shares = match_shares(images, values) if config.condition == "caption" else class_shares(images, values)
        found |= {f"match_{name}": share for name, share in shares.items()}
        found["match_error"] = (shares["all"] * (1 - shares["all"]) / len(images)) ** 0.5
    if config.extractor is None and config.caption_model is None:
        return found
    for number, image in enumerate(images):
        write_picture(folder / f"{number:08d}.png", image)
    drawn = FileImages(str(folder), num=len(images))
    if (extractor := config.load_extractor("cpu")) is not None:
        count = config.held_out
        if count is not None and config.data.source != "drawings":
            count = min(count, len(Images(config.data, "validation")))
        reference = DataImages(config.data, "validation", count)
        found |= {"frechet_distance": next(iter(calculate(reference, drawn, extractor, ["frechet"]).values()))}
    if config.caption_model is not None:
        score = caption_score(drawn, without(values, config.remove), config.caption_model)
        found |= {"caption_first": score.first, "caption_error": score.first_error}
    return found


def write_tables(config: PeersComparison, rows: list[dict[str, Any]]) -> None:
    """``peers.json`` and ``peers.md``; columns that no row has are left out."""
    folder = Path(config.output).expanduser()
    settings = dataclasses.asdict(config)
    length = f"{config.steps} steps" if config.seconds is None else f"{config.seconds:g} seconds of the processor"
    about = f"{machine(torch.device('cpu'))}; {length} of each, {config.num} samples, seconds are medians of turns"
    write_json(folder / "peers.json", {"rows": rows, "settings": settings, "machine": about}, nan_as_null=True)
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [[shown(name, row.get(name)) for name in names] for row in rows]
    text = [markdown_table([COLUMNS[name] for name in names], lines), "", f"{about}."]
    write_text(folder / "peers.md", "\n".join(text) + "\n")


def shown(name: str, value: Any) -> Any:
    """A cell: shares in percent, parameters in millions."""
    if value is None or isinstance(value, str):
        return value
    if name in ("match_all", "match_error", "caption_first", "caption_error"):
        return f"{100 * value:.1f} %"
    if name == "parameters":
        return f"{value / 1e6:.2f} million"
    if name == "steps":
        return f"{value:,}"
    return format(value, ".3g")

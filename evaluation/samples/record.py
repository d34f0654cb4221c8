"""What a folder of generated images says about itself: settings that later runs must share, and each image's condition."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tarflow.common.files import read_json_lines, replaced, write_json
from tarflow.evaluation.conditions import Conditions
from tarflow.evaluation.samples.told import CONDITIONS
from tarflow.flows.decoding.names import DEFAULT_TOLERANCE
from tarflow.pipeline.call.trajectory_sampling import trajectory_steps
from tarflow.pipeline.call.walk import check_walk, resolve_level, resolve_steps
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.vae.codec import weights_hash

RECORD = "generation.json"
OTHERWISE = "take another folder or remove it"


def settings_of(config: Any, conditions: Conditions, pipe: TARFlowPipeline) -> dict[str, Any]:
    """Everything that decides what image i is, as JSON has it."""
    names = ("batch_size", "seed", "format", "guidance_scale", "noise_std", "decoding", "dtype", "fast")
    settings = {"pipeline": pipeline_hash(pipe), **{name: getattr(config, name) for name in names}}
    settings["denoise"], settings["decoder"] = pipe.check_outputs(config.denoise, "np", config.decoder, config.decoding)
    for name in ("guidance_scale", "noise_std"):
        if settings[name] is None:
            settings[name] = getattr(pipe.config, name)
    temperature = pipe.config.temperature if config.temperature is None else config.temperature
    if temperature != 1:  # else they are as in earlier versions
        settings["temperature"] = temperature
    if pipe.noise_levels is not None:  # else they are as in earlier versions
        level = resolve_level(pipe.noise_levels, config.noise_level)
        asked, default = config.num_inference_steps, pipe.config.num_inference_steps
        steps = resolve_steps(pipe.noise_levels, asked, default, bool(settings["denoise"]), level)
        walk = check_walk(config.walk, pipe.noise_levels, steps, level)
        settings |= {"noise_level": level, "num_inference_steps": steps, "walk": walk}
    along = trajectory_steps(pipe, config.num_inference_steps, config.decoding, config.denoise)
    if along is not None:
        settings["num_inference_steps"] = along
    if config.decoding in ("auto", "jacobi") or (
        config.decoding == "gs_jacobi" and config.tolerance != DEFAULT_TOLERANCE
    ):
        settings["tolerance"] = config.tolerance  # earlier versions told none of gs_jacobi
    return json.loads(json.dumps({**settings, "conditions": conditions.summary}))


def pipeline_hash(pipe: TARFlowPipeline) -> str:
    """SHA-256 of a pipeline's settings, weights and vocabulary. Its default decoder, denoising, steps and temperature do
    not count, as records of images name those that were taken."""
    digest, further = hashlib.sha256(), ("finetuned_decoder", "student")
    absent = [name for name in further if getattr(pipe, name) is None]
    # Which older pipelines do not have.
    newer = {"text_options": None, "noise_levels": None, "noise_conditioning": False, "scheduler": (None, None)}
    newer |= {"deep_order": None, "transporter_levels": False}
    settings = {**pipe.flow.config, **pipe.config}
    absent += [name for name, default in newer.items() if settings.get(name, default) == default]
    left_out = ("decoder", "denoise", "num_inference_steps", "temperature", *absent)
    for part in (pipe, pipe.flow, pipe.vae, *([] if pipe.scheduler is None else [pipe.scheduler])):
        settings = {} if part is None else {key: value for key, value in part.config.items() if key[0] != "_"}
        left = left_out if part is pipe else absent if part is pipe.flow else ()
        settings = {key: value for key, value in settings.items() if key not in left}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    present = [getattr(pipe, name) for name in further if name not in absent]
    for module in (pipe.flow, pipe.vae, pipe.text_encoder, *present):
        digest.update(b"none" if module is None else weights_hash(module).encode())
    if pipe.tokenizer is not None:
        digest.update(repr(sorted(pipe.tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


def pictures_in(out: Path) -> Iterator[Path]:
    """Files of generated pictures."""
    return (path for name in ("*.png", "samples.npz") for path in out.rglob(name))


def refuse_strangers(out: Path) -> None:
    """Refuse a folder of pictures that no record tells of: they would count as generated.

    Raises:
        ValueError: if there is such a picture.
    """
    picture = next(pictures_in(out), None)
    if picture is not None and read_record(out) is None:
        raise ValueError(f"{str(out)!r} holds pictures such as {picture.name}, but no {RECORD}: take another folder")


def read_record(out: Path) -> dict[str, Any] | None:
    """What an earlier run wrote about a folder; None if there was none."""
    path = out / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}): remove that folder or take another") from error
    if not isinstance(record, dict):
        raise ValueError(f"{str(path)!r} is no record of generated images: take another folder")
    return record


def check_record(config: Any, earlier: dict[str, Any] | None, record: dict[str, Any]) -> None:
    """Refuse to mix images of several settings. More PNG files of the same settings may be added.

    Raises:
        ValueError: with the first setting that differs, or for a record of something else.
    """
    if earlier is None:
        return
    if not isinstance(earlier.get("settings"), dict) or "num" not in earlier:
        raise ValueError(f"{RECORD} in {config.out!r} is no record of generated images: take another folder")
    reason = None
    # Records of earlier versions name no decoder, and those of all noise no temperature.
    settings = {"decoder": "vae", "temperature": 1.0, **earlier["settings"]}
    wanted = {**record["settings"], "temperature": record["settings"].get("temperature", 1.0)}
    for name, here in wanted.items():
        there = settings.get(name)
        if there != here:
            reason = f"{name} was {there!r} there and is {here!r} here"
            if name == "pipeline":
                reason = "they are of another pipeline, or of one that was changed"
            break
    grows = config.format == "png" and earlier["num"] < config.num
    if reason is None and earlier["num"] != config.num and not grows:
        reason = f"num was {earlier['num']} there and is {config.num} here"
    if reason is not None:
        raise ValueError(f"{config.out!r} holds images of other settings: {reason}; {OTHERWISE}")


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write ``generation.json``, whole or not at all."""
    versions = {name: version(name) for name in ("tarflow", "torch", "diffusers", "transformers", "numpy")}
    write_json(out / RECORD, {**record, "versions": versions}, indent=1)


def condition_rows(conditions: Conditions, num: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """What each image is drawn from, as the lines of ``conditions.jsonl`` have it."""
    for start in range(0, num, batch_size):
        indices = range(start, min(start + batch_size, num))
        values = conditions.values(indices) or [None] * len(indices)
        for index, value in zip(indices, values, strict=True):
            yield {"index": index} if value is None else {"index": index, conditions.kind: value}


def check_conditions(out: Path, conditions: Conditions, num: int, batch_size: int) -> None:
    """Refuse to go on in a folder whose images were drawn from other conditions, such as captions that were changed since.

    Args:
        out: the folder, of which a record is there.
        conditions: as they are now.
        num: of images that the record is of.
        batch_size: of conditions that are looked up at once.

    Raises:
        ValueError: with the first image that differs, or if the folder does not tell.
    """
    path = out / CONDITIONS
    if not path.is_file():
        if conditions.fixed:
            return  # the settings, which are compared, say it all
        raise ValueError(
            f"{str(out)!r} lacks {CONDITIONS}, so what its images were drawn from is not known: {OTHERWISE}"
        )
    there = {row.get("index"): row for _, row in read_json_lines(path) if isinstance(row, dict)}
    for row in condition_rows(conditions, num, batch_size):
        index = row["index"]
        if there.get(index) != row:
            kind = conditions.kind
            before, now = there.get(index, {}).get(kind), row.get(kind)
            raise ValueError(
                f"image {index} in {str(out)!r} was drawn from the {kind} {before!r}, which now is {now!r}: {OTHERWISE}"
            )


def write_conditions(out: Path, conditions: Conditions, num: int, batch_size: int) -> None:
    """Write each image's caption or label as a line of ``conditions.jsonl``."""
    with replaced(out / CONDITIONS) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        for row in condition_rows(conditions, num, batch_size):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

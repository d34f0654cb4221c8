"""A pipeline copied with its weights in 16 bits, as the shipped ones are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from tarflow.common.files import check_writable, write_json
from tarflow.pipeline.loading.examples import EXAMPLES
from tarflow.pipeline.loading.folder import HELD_OUT, own_folder, written_into
from tarflow.pipeline.loading.place import INDEX, locate
from tarflow.pipeline.opening import open_pipeline


def export(pipeline: str, output: str, dtype: torch.dtype, denoiser: bool = True) -> int:
    """Write the copy, without the flow's learned denoiser if ``denoiser`` is False; returns the size of its files in bytes.

    Raises:
        ValueError: if there is no such pipeline, ``output`` is a folder of something else, or a weight is too large
            for the type.
        OSError: if a file cannot be written.
    """
    target = own_folder(pipeline, output)
    check_writable(target, folder=True)
    pipe = open_pipeline(pipeline, "cpu")
    if not denoiser and getattr(pipe.flow, "denoiser", None) is not None:
        pipe.flow.denoiser = None
        pipe.flow.register_to_config(learned_denoiser="none")
    precision = getattr(pipe.text_encoder, "dtype", None)
    for name in ("flow", "vae", "finetuned_decoder", "student", "text_encoder"):
        module = getattr(pipe, name)
        if module is not None and module.dtype == torch.float32:  # what has 16 bits already keeps them
            rounded(module, name, dtype)
    with written_into(target) as temporary:
        pipe.save_pretrained(temporary)
        forget_paths(temporary)
        if precision is not None:  # Transformers reads weights in the type that the settings name
            settings = temporary / "text_encoder" / "config.json"
            named = {"dtype": str(precision).removeprefix("torch.")}
            write_json(settings, json.loads(settings.read_text(encoding="utf-8")) | named)
        means, examples = (Path(locate(pipeline), name) for name in (HELD_OUT, EXAMPLES))
        if means.is_file():
            shutil.copyfile(means, temporary / HELD_OUT)
        if examples.is_file() and not (target / EXAMPLES).exists():  # what somebody wrote there stays
            shutil.copyfile(examples, temporary / EXAMPLES)
    if not means.is_file():  # those that lie there are of the pipeline that was here before
        (target / HELD_OUT).unlink(missing_ok=True)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def forget_paths(folder: Path) -> None:
    """Take out of the settings where the parts were loaded from, which says nothing on other machines."""
    for file in [*folder.glob(INDEX), *folder.glob("*/config.json")]:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.pop("_name_or_path", None) is not None:
            write_json(file, settings)


def rounded(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Weights in another type, in place."""
    module.to(dtype)
    for key, value in module.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{name}.{key} has numbers that {dtype} cannot hold: take --dtype float32")

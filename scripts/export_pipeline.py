"""Copy a pipeline with the weights of flow and decoders in 16 bits, as the shipped ones are.

    python -m tarflow.scripts.export_pipeline --pipeline runs/NAME/pipeline --output models/NAME

What the output folder has of other files, such as cards (README.md) and example prompts, stays there. Loading gives
float32 again; the text encoder, which is small, keeps its precision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from tarflow.common.command import ending
from tarflow.common.files import check_writable, write_json
from tarflow.pipeline.loading.folder import INDEX, own_folder, written_into
from tarflow.pipeline.opening import open_pipeline

DTYPES = ("float16", "bfloat16", "float32")


def export(pipeline: str, output: str, dtype: torch.dtype) -> int:
    """Write the copy; returns the size of its files in bytes.

    Raises:
        ValueError: if there is no such pipeline, ``output`` is a folder of something else, or a weight is too large
            for the type.
        OSError: if a file cannot be written.
    """
    target = own_folder(pipeline, output)
    check_writable(target, folder=True)
    pipe = open_pipeline(pipeline, "cpu")
    for name in ("flow", "vae", "finetuned_decoder"):
        module = getattr(pipe, name)
        if module is not None:
            rounded(module, name, dtype)
    with written_into(target) as temporary:
        pipe.save_pretrained(temporary)
        forget_paths(temporary)
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder, shipped name or hub id")
    parser.add_argument(
        "--output", required=True, help="folder of the copy; a pipeline there is replaced, other files stay"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    args = parser.parse_args(argv)
    with ending():
        size = export(args.pipeline, args.output, getattr(torch, args.dtype))
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

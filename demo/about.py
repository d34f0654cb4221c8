"""What a pipeline is, in a few words: its name, its sizes, its card, its examples."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

from tarflow.common.words import count_in_words
from tarflow.evaluation.likelihood.held_out import UNITS
from tarflow.pipeline.loading.examples import example_captions, folder_of
from tarflow.pipeline.loading.folder import HELD_OUT
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline

CONDITIONS = {"prefix": "captions", "none": "none", "class_vectors": "classes", "class_prefix": "classes"}
MOST_EXAMPLES = 12
#: Pictures of a card that are shown, by the ends of their names, up to so many bytes.
PICTURES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
LARGEST_PICTURE = 4_000_000


def name_of(pipe: TARFlowPipeline) -> str:
    """The folder's name, or the run's if the folder is only called "pipeline"."""
    folder = folder_of(pipe)
    if folder is None:
        return "a pipeline"
    folder = folder.resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name


def summary(pipe: TARFlowPipeline) -> str:
    """One line: what it draws, how large."""
    config = pipe.flow.config
    side = config.sample_size * pipe.codec.factor
    kinds = {"prefix": "draws from captions", "none": "draws without a condition"}
    kind = kinds.get(config.conditioning, f"draws {config.num_classes} classes")
    return f"A normalizing flow that {kind}, {side} × {side} pixels."


def details(pipe: TARFlowPipeline) -> list[tuple[str, str]]:
    """Names and values for the page."""
    config = pipe.flow.config
    size = f"{config.sample_size} × {config.sample_size}"
    tokens = (config.sample_size // config.patch_size) ** 2
    what = "pixels" if pipe.vae is None else "latents"
    sizes = {name: count for name, module in pipe.components.items() if (count := parameters(module))}
    return [
        ("name", name_of(pipe)),
        ("flow", f"{len(pipe.flow.blocks)} blocks, width {config.width}, {tokens} tokens"),
        ("models", f"{what} of {config.in_channels} channels, {size}"),
        ("condition", CONDITIONS[config.conditioning]),
        ("parameters", ", ".join(f"{name} {count_in_words(count)}" for name, count in sizes.items())),
        ("training noise σ", f"{pipe.config.noise_std:g}")
        if pipe.noise_levels is None
        else ("noise levels σ", "{:g} to {:g}".format(*pipe.noise_levels)),
        *([("held-out pictures", told)] if (told := held_out_in_words(pipe)) else []),
        ("guidance", f"{pipe.config.guidance_scale:g} by default, {pipe.config.guidance_method}"),
        ("temperature of the noise", f"{pipe.config.temperature:g}"),
        ("device", f"{pipe.device}, {str(pipe.flow.dtype).removeprefix('torch.')}"),
    ]


def parameters(module: Any) -> int:
    """Parameters of a component; 0 if it has none."""
    return sum(parameter.numel() for parameter in module.parameters()) if hasattr(module, "parameters") else 0


def card(pipe: TARFlowPipeline) -> str:
    """The folder's README.md without its head and tags; "" if none.

    Pictures of the folder itself are in the text; a paragraph with one from elsewhere, which the page would not have, is
    left out with what it says of it.
    """
    folder = folder_of(pipe)
    if folder is None or not (folder / "README.md").is_file():
        return ""
    text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    paragraphs = (with_pictures(paragraph, folder) for paragraph in re.split(r"\n{2,}", text.strip()))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def with_pictures(paragraph: str, folder: Path) -> str:
    """A paragraph with its pictures inside the text; "" if it has one that is not in the folder."""

    def inside(found: re.Match[str]) -> str:
        file = (folder / found[2]).resolve()
        own = file.is_relative_to(folder.resolve()) and file.suffix.lower() in PICTURES and file.is_file()
        if not own or file.stat().st_size > LARGEST_PICTURE:
            raise LookupError(found[2])
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        return f"![{found[1]}](data:{PICTURES[file.suffix.lower()]};base64,{data})"

    try:
        if re.search(r"!\[[^\]]*\]\[|<img", paragraph):
            return ""
        return re.sub(r"!\[([^\]]*)\]\(([^)]*)\)", inside, re.sub(r"<[^>]+>", "", paragraph))
    except (LookupError, OSError, ValueError):
        return ""


def held_out(pipe: TARFlowPipeline) -> dict[str, float]:
    """Means over held-out pictures, which training writes into the folder's ``held_out.json``; nothing without it.

    Names are those of metrics: those of `UNITS`, with "_without_condition" if somebody measured that and added it,
    "psnr" of an autoencoder that was trained along, and "images", how many there were.
    """
    folder = folder_of(pipe)
    try:
        values = json.loads((folder / HELD_OUT).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    values = values if isinstance(values, dict) else {}
    plain = {name: value for name, value in values.items() if isinstance(value, int | float)}
    if pipe.noise_levels is not None:  # those that the page shows are at the level of its drawings
        plain |= {name: plain[key] for name in UNITS if (key := f"{name}_at_{pipe.drawing_level:g}") in plain}
    return {name: float(value) for name, value in plain.items() if math.isfinite(value)}


def held_out_in_words(pipe: TARFlowPipeline) -> str:
    """Their likelihood; "" if it is not known."""
    values = held_out(pipe)
    for name, unit in UNITS.items():
        if name in values:
            count = f", the mean over {values['images']:,.0f} pictures" if "images" in values else ""
            return f"{values[name]:.3f} {unit}{count}"
    return ""


def examples(pipe: TARFlowPipeline) -> list[str]:
    """The first prompts of the folder's ``examples.json``; none without such a file."""
    return example_captions(pipe)[:MOST_EXAMPLES]

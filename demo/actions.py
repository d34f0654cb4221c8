"""What the page's buttons do, without its looks."""

from __future__ import annotations

import logging
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from tarflow.demo import markup
from tarflow.demo.drawing import Progress, Request, Result, check_prompt, checked, draw
from tarflow.demo.rebuild import Rebuilt, read_upload, rebuild


class Actions:
    """Of one page.

    Args:
        pipe: a `TARFlowPipeline`. One run at a time uses it.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.kind = pipe.flow.config.conditioning
        self.lock = threading.Lock()
        self.folder = tempfile.TemporaryDirectory(prefix="tarflow-demo-")

    def generate(
        self, prompt: Any, label: Any, guidance_scale: Any, count: Any, decoding: Any, noise_removal: Any, seed: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Status, pictures, strip and download, again and again while drawing; the last ones are the result.

        An error of any kind becomes a sentence in the status.
        """
        yield markup.progress(Progress()), gr.skip(), "", gr.update(visible=False)
        try:
            request = checked(self.pipe, Request(prompt, label, guidance_scale, decoding, noise_removal, seed, count))
            shown = 0
            for state in draw(self.pipe, request, self.lock):
                new = len(state.stages) > shown
                shown = len(state.stages)
                pictures = markup.pictures(state.stages[-1].images) if new else gr.skip()
                strip = markup.strip(state.stages) if new else gr.skip()
                if state.result is None:
                    yield markup.progress(state), pictures, strip, gr.skip()
                else:
                    file = self.archive(state.result, request)
                    yield (
                        markup.result_facts(state.result),
                        markup.pictures(state.result.images),
                        strip,
                        gr.update(value=file, visible=True),
                    )
        except Exception as error:  # noqa: BLE001 (the page goes on after any error)
            yield markup.sentence(sentence_of(error)), gr.skip(), gr.skip(), gr.skip()

    def rebuild(self, upload: Any, caption: Any, label: Any) -> tuple[str, str]:
        """Pictures and numbers of an uploaded file; an error of any kind becomes a sentence in place of the numbers."""
        try:
            caption = caption if self.kind == "prefix" and (caption or "").strip() else None
            if caption is not None:
                check_prompt(caption)
            label = label if self.kind.startswith("class") else None
            with self.lock:
                rebuilt = rebuild(self.pipe, read_upload(upload), caption, label)
            return rebuilt_cards(rebuilt), rebuilt_facts(rebuilt)
        except Exception as error:  # noqa: BLE001 (the page goes on after any error)
            return "", markup.sentence(sentence_of(error))

    def archive(self, result: Result, request: Request) -> str:
        """The pictures as a zip archive, in place of the one before."""
        folder = Path(self.folder.name)
        for old in folder.iterdir():
            old.unlink()
        path = folder / f"drawings-{request.seed}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for i, image in enumerate(result.images):
                with archive.open(f"drawing-{request.seed}-{i}.png", "w") as file:
                    image.save(file, "PNG")
        return str(path)

    def classes(self) -> list[tuple[str, int]]:
        """Names of the classes and their indices; the indices alone if there are no names."""
        names = {int(index): name for index, name in (self.pipe.config.id2label or {}).items()}
        return [(names.get(index, f"class {index}"), index) for index in range(self.pipe.flow.config.num_classes)]


def sentence_of(error: Exception) -> str:
    """An error as one sentence; those that are not about the input are also logged."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, ValueError | FloatingPointError):
        logging.getLogger(__name__).error("a run failed", exc_info=error)
        text = f"The run failed: {text[:300]}"
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def rebuilt_cards(rebuilt: Rebuilt) -> str:
    """The pictures of an encoded and rebuilt upload."""
    figures = [markup.figure(rebuilt.fitted, "original, fitted to the model")]
    if rebuilt.reconstruction is not None:
        figures.append(markup.figure(rebuilt.reconstruction, "the autoencoder's reconstruction"))
    figures.append(markup.figure(rebuilt.round_trip, "rebuilt from z"))
    figures.append(markup.figure(rebuilt.noise, "z, what the flow makes of it", crisp=True))
    return f'<div class="cards">{"".join(figures)}</div>'


def rebuilt_facts(rebuilt: Rebuilt) -> str:
    """Its numbers."""
    unit = "bits per dimension" if rebuilt.quantity == "bits_per_dim" else "nats per latent dimension"
    rows = []
    if rebuilt.psnr is not None:
        rows.append(("autoencoder", f"PSNR {rebuilt.psnr:.1f} dB"))
    rows.append(("flow there and back", f"largest |x − x'| {rebuilt.error:.1e}"))
    if rebuilt.likelihood is not None:
        rows.append(("likelihood, as described", f"{rebuilt.likelihood:.3f} {unit}"))
    rows.append(("likelihood, no condition", f"{rebuilt.likelihood_alone:.3f} {unit} (lower is likelier)"))
    return markup.facts(rows)

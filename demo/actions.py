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

from tarflow.demo import about, markup
from tarflow.demo.drawing import Progress, Request, Result, StoppedError, check_prompt, checked, draw
from tarflow.demo.rebuild import Rebuilt, read_upload, rebuild
from tarflow.evaluation.likelihood.held_out import UNITS
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline

EMPTY = '<div class="empty">{}</div>'
NOTHING_DRAWN = EMPTY.format("The pictures form here, block by block.")
NOTHING_REBUILT = EMPTY.format("A picture goes to noise and back here.")
#: A picture whose PSNR is by so many dB below that of held-out ones is unlike them.
UNUSUAL = 5.0


def window_of(opened: gr.Request | None) -> str | None:
    """Gradio's name for one open page; two windows have two."""
    return None if opened is None else opened.session_hash


class Actions:
    """Of one page.

    Args:
        pipe: a `TARFlowPipeline`. One run at a time uses it.

    Attributes:
        stops: what Stop sets for the last run of each page that was opened, by Gradio's name for it. Gradio's own way of
            cancelling is not used: it misses a run that has not begun, and the next run can be lost by it.
    """

    def __init__(self, pipe: TARFlowPipeline):
        self.pipe = pipe
        self.kind = pipe.flow.config.conditioning
        self.lock = threading.Lock()
        self.stops: dict[str | None, threading.Event] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="tarflow-demo-")

    def generate(
        self,
        prompt: Any,
        label: Any,
        guidance_scale: Any,
        count: Any,
        decoding: Any,
        noise_removal: Any,
        seed: Any,
        steps: Any = None,
        opened: gr.Request | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """Status, pictures, strip, download, Draw and Stop, again and again while drawing; the last ones are the result.

        An error of any kind becomes a sentence in the status.
        """
        stopped = self.stops.get(window_of(opened)) or threading.Event()
        going_on = gr.skip(), gr.skip()
        yield markup.progress(Progress()), gr.skip(), "", gr.update(visible=False), *going_on
        try:
            asked = Request(prompt, label, guidance_scale, decoding, noise_removal, seed, count, steps)
            request = checked(self.pipe, asked)
            told = self.condition(request), request.seed, None if self.kind == "none" else request.guidance_scale
            shown = 0
            for state in draw(self.pipe, request, self.lock, stopped):
                new = len(state.stages) > shown
                shown = len(state.stages)
                pictures = markup.pictures(state.stages[-1].images, *told) if new else gr.skip()
                strip = markup.strip(state.stages) if new else gr.skip()
                if state.result is None:
                    yield markup.progress(state), pictures, strip, gr.skip(), *going_on
                else:
                    file = self.archive(state.result, request)
                    yield (
                        markup.result_facts(state.result),
                        markup.pictures(state.result.images, *told),
                        strip,
                        gr.update(value=file, visible=True),
                        *self.end(),
                    )
        except StoppedError:
            yield markup.sentence("Stopped.", "note"), gr.skip(), gr.skip(), gr.skip(), *self.end()
        except Exception as error:  # noqa: BLE001 (the page goes on after any error)
            yield markup.sentence(sentence_of(error)), NOTHING_DRAWN, "", gr.update(visible=False), *self.end()

    def begin(self, opened: gr.Request | None = None) -> tuple[Any, ...]:
        """Draw can be pressed no more, and Stop can; and the status, before the run's turn comes."""
        self.stops[window_of(opened)] = threading.Event()
        return gr.update(interactive=False), gr.update(interactive=True), markup.progress(Progress(message="starting"))

    def end(self) -> tuple[Any, Any]:
        """Draw can be pressed again, and Stop cannot."""
        return gr.update(interactive=True), gr.update(interactive=False)

    def stop(self, opened: gr.Request | None = None) -> None:
        """Ask the run of this page to stop: it says itself when it has."""
        if window_of(opened) in self.stops:
            self.stops[window_of(opened)].set()

    def condition(self, request: Request) -> str:
        """What a request asks for, in words."""
        if self.kind == "prefix":
            return (request.prompt or "").strip()
        return next((name for name, index in self.classes() if index == request.label), "")

    def look(self, upload: Any) -> tuple[str, str, Any]:
        """At a file as soon as it is chosen: nothing is shown of the one before, and one that cannot be read is refused."""
        if not upload:
            return "", NOTHING_REBUILT, gr.update(interactive=False)
        try:
            read_upload(upload)
        except Exception as error:  # noqa: BLE001 (the page goes on after any error)
            return "", markup.sentence(sentence_of(error)), gr.update(interactive=False)
        return "", NOTHING_REBUILT, gr.update(interactive=True)

    def rebuild(self, upload: Any, caption: Any, label: Any) -> tuple[str, str]:
        """Pictures and numbers of an uploaded file; an error of any kind becomes a sentence in place of the numbers."""
        try:
            caption = caption if self.kind == "prefix" and (caption or "").strip() else None
            if caption is not None:
                check_prompt(caption)
            label = label if self.kind.startswith("class") else None
            with self.lock:
                rebuilt = rebuild(self.pipe, read_upload(upload), caption, label)
            return rebuilt_cards(rebuilt), rebuilt_facts(rebuilt, about.held_out(self.pipe))
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
                told = markup.named(self.condition(request), request.seed, i + 1)
                archive.writestr(f"drawing-{request.seed}-{i}.png", markup.png(image, told))
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


def rebuilt_facts(rebuilt: Rebuilt, held_out: dict[str, float]) -> str:
    """Its numbers, beside those of pictures that the model was not trained on, as far as the pipeline knows them.

    Args:
        rebuilt: what became of the picture.
        held_out: means of held-out pictures, see `tarflow.demo.about.held_out`.
    """
    unit = UNITS[rebuilt.quantity]
    rows = []
    if rebuilt.psnr is not None:
        rows.append(("autoencoder", f"PSNR {rebuilt.psnr:.1f} dB{beside(held_out, 'psnr', '.1f', ' dB')}"))
        rows.append(("what it knows", known(rebuilt.psnr, held_out.get("psnr"))))
    rows.append(("flow there and back", f"largest |x − x'| {rebuilt.error:.1e}"))
    if rebuilt.likelihood is not None:
        mean = beside(held_out, rebuilt.quantity, ".3f")
        rows.append(("likelihood, as described", f"{rebuilt.likelihood:.3f} {unit}{mean}"))
    mean = beside(held_out, f"{rebuilt.quantity}_without_condition", ".3f")
    if not mean and rebuilt.likelihood is None:
        mean = beside(held_out, rebuilt.quantity, ".3f")
    rows.append(("likelihood, no condition", f"{rebuilt.likelihood_alone:.3f} {unit}{mean}"))
    rows.append(("", "lower is likelier"))
    return markup.facts(rows)


def beside(held_out: dict[str, float], name: str, digits: str, unit: str = "") -> str:
    """The mean of held-out pictures in brackets; "" if it is not known."""
    return f" (held-out pictures: {held_out[name]:{digits}}{unit})" if name in held_out else ""


def known(psnr: float, usual: float | None) -> str:
    """What the autoencoder makes of a picture, in words."""
    if usual is not None and psnr < usual - UNUSUAL:
        return "pictures like those of its training; this one is unlike them, and the flow sees only what is left of it"
    return "pictures like those of its training; the flow sees a picture as the autoencoder keeps it"

"""What is on the page, and where."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from tarflow.demo import about, markup
from tarflow.demo.actions import Actions
from tarflow.demo.drawing import LARGEST_GUIDANCE, MOST_IMAGES, decodings, noise_removals

EMPTY = '<div class="empty">{}</div>'
#: Below a million, so that it is easily typed.
NEW_SEED = "() => Math.floor(Math.random() * 1e6)"
#: Uploads and downloads are looked for every so many seconds, and deleted when older than that.
CACHE_SECONDS = (300, 3600)
NOISE_REMOVAL_NAMES = {
    "none": "nothing",
    "score": "score step",
    "learned": "learned denoiser",
    "finetuned": "finetuned decoder",
}


def build(pipe: Any) -> gr.Blocks:
    """The page over a pipeline; see `tarflow.demo.page` for starting it.

    Args:
        pipe: a `TARFlowPipeline`, on its device.
    """
    actions = Actions(pipe)
    with gr.Blocks(title=f"tarflow: {about.name_of(pipe)}", analytics_enabled=False, delete_cache=CACHE_SECONDS) as app:
        gr.HTML(f'<div class="heading"><h1>{escape(about.name_of(pipe))}</h1><p>{about.summary(pipe)}</p></div>')
        with gr.Tab("Generate"):
            generate_tab(actions)
        with gr.Tab("Encode and rebuild"):
            rebuild_tab(actions)
        with gr.Tab("About"):
            gr.HTML(markup.facts(about.details(pipe)))
            if text := about.card(pipe):
                gr.Markdown(text)
    app.queue(default_concurrency_limit=1, api_open=False)
    return app


def generate_tab(actions: Actions) -> None:
    """Controls on the left, the drawing on the right."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            prompt, label = condition_inputs(actions, "describe a picture")
            if actions.kind == "prefix" and (prompts := about.examples(actions.pipe)):
                gr.Examples(prompts, prompt, label="For example", cache_examples=False)
            scale = gr.Slider(
                1,
                LARGEST_GUIDANCE,
                value=max(1.0, actions.pipe.config.guidance_scale),
                step=0.1,
                label="Guidance scale",
                info="1 is off",
                visible=actions.kind != "none",
            )
            count = gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images")
            with gr.Row(equal_height=False):
                seed = gr.Number(0, label="Seed", min_width=120, scale=3, elem_id="seed")
                new_seed = gr.Button("New seed", size="md", min_width=90, scale=1, elem_id="new-seed")
            removals = noise_removals(actions.pipe)
            removal = gr.Radio(
                [(NOISE_REMOVAL_NAMES[name], name) for name in removals], value=removals[0], label="Remove noise by"
            )
            decoding = gr.Radio(
                decodings(actions.pipe), value="auto", label="Invert blocks by", info="auto tries them at its first run"
            )
        with gr.Column(scale=7, min_width=320):
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw", scale=3)
                stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
            status = gr.HTML(elem_id="status")
            pictures = gr.HTML(EMPTY.format("The pictures form here, block by block."), elem_id="pictures")
            strip = gr.HTML(elem_id="strip")
            download = gr.DownloadButton("Download the pictures", size="md", elem_id="download", visible=False)
    run = gr.on(
        [button.click, *([prompt.submit] if actions.kind == "prefix" else [])],
        actions.generate,
        [prompt, label, scale, count, decoding, removal, seed],
        [status, pictures, strip, download],
        show_progress="hidden",
        concurrency_id="pipeline",
        concurrency_limit=1,
    )
    stop.click(lambda: markup.sentence("Stopped.", "note"), None, status, cancels=[run], queue=False)
    new_seed.click(None, None, seed, js=NEW_SEED)


def rebuild_tab(actions: Actions) -> None:
    """The upload on the left, what became of it on the right."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            upload = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Picture", height=280, buttons=[])
            # Gradio would decode the picture here, before its size is known.
            upload.preprocess = lambda file: None if file is None else file.path
            caption, label = condition_inputs(actions, "optional", required=False)
            button = gr.Button("Encode and rebuild", variant="primary", elem_id="rebuild")
        with gr.Column(scale=7, min_width=320):
            cards = gr.HTML(elem_id="cards")
            numbers = gr.HTML(EMPTY.format("A picture goes to noise and back here."), elem_id="numbers")
    button.click(
        actions.rebuild,
        [upload, caption, label],
        [cards, numbers],
        show_progress="minimal",
        show_progress_on=numbers,
        concurrency_id="pipeline",
        concurrency_limit=1,
    )


def condition_inputs(
    actions: Actions, placeholder: str | None, required: bool = True
) -> tuple[gr.Textbox, gr.Dropdown]:
    """Inputs for a caption and for a class, of which at most one is seen."""
    text = actions.kind == "prefix"
    name = "Prompt" if required else "Its caption"
    caption = gr.Textbox(label=name, placeholder=placeholder, max_lines=4, visible=text)
    choices: list[Any] = actions.classes()
    if not required:
        choices = [("no class", None), *choices]
    value = choices[0][1] if choices else None
    label = gr.Dropdown(choices, value=value, label="Class", visible=actions.kind.startswith("class"))
    return caption, label

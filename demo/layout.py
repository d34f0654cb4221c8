"""What is on the page, and where."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from tarflow.demo import about, markup
from tarflow.demo.actions import NOTHING_DRAWN, NOTHING_REBUILT, Actions
from tarflow.demo.drawing import LARGEST_GUIDANCE, MOST_IMAGES, MOST_STEPS, decodings, noise_removals
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline

#: Below a million, so that it is easily typed.
NEW_SEED = "() => Math.floor(Math.random() * 1e6)"
#: Enter in the prompt presses Draw, so that it does nothing while one draws.
PRESS = "() => { document.querySelector('#draw').click() }"
#: In the browser, before the server answers: a second press of Draw would draw twice.
PRESSED = "() => [{__type__: 'update', interactive: false}]"
#: Uploads and downloads are looked for every so many seconds, and deleted when older than that.
CACHE_SECONDS = (300, 3600)
NOISE_REMOVAL_NAMES = {
    "none": "nothing",
    "score": "score step",
    "learned": "learned denoiser",
    "finetuned": "finetuned decoder",
}


def build(pipe: TARFlowPipeline) -> gr.Blocks:
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
    """What to draw and Draw itself, then the drawing, then options; on wide screens the drawing is beside the two."""
    prompts = about.examples(actions.pipe) if actions.kind == "prefix" else []
    with gr.Row(equal_height=False, elem_id="generate"):
        with gr.Column(min_width=280, elem_id="ask"):
            prompt, label = condition_inputs(actions, "describe a picture", prompts[0] if prompts else None)
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw", scale=3)
                stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80, interactive=False)
        with gr.Column(min_width=280, elem_id="result"):
            status = gr.HTML(elem_id="status")
            pictures = gr.HTML(NOTHING_DRAWN, elem_id="pictures")
            strip = gr.HTML(elem_id="strip")
            download = gr.DownloadButton("Download the pictures", size="md", elem_id="download", visible=False)
        with gr.Column(min_width=280, elem_id="options"):
            if prompts:
                gr.Examples(prompts, prompt, label="For example", cache_examples=False)
            count = gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images")
            with gr.Row(equal_height=False):
                seed = gr.Number(0, label="Seed", min_width=120, scale=3, elem_id="seed")
                new_seed = gr.Button("New seed", size="md", min_width=90, scale=1, elem_id="new-seed")
            scale, removal, steps, decoding = expert_options(actions)
    prompt.submit(None, None, None, js=PRESS)
    button.click(None, None, button, js=PRESSED)
    begun = button.click(actions.begin, None, [button, stop, status], show_progress="hidden", queue=False)
    begun.then(
        actions.generate,
        [prompt, label, scale, count, decoding, removal, seed, steps],
        [status, pictures, strip, download, button, stop],
        show_progress="hidden",
        # They wait for the pipeline's lock, not for Gradio's turn, in which Stop would not reach them.
        concurrency_limit=None,
    )
    stop.click(None, None, stop, js=PRESSED)
    stop.click(actions.stop, None, None, queue=False)
    new_seed.click(None, None, seed, js=NEW_SEED)


def expert_options(actions: Actions) -> tuple[gr.Slider, gr.Radio, gr.Slider, gr.Radio]:
    """Guidance, removal of noise and its steps, and decoding, folded: their defaults are the pipeline's own."""
    with gr.Accordion("More options", open=False, elem_id="more"):
        scale = gr.Slider(
            1,
            LARGEST_GUIDANCE,
            value=max(1.0, actions.pipe.config.guidance_scale),
            step=0.1,
            label="Guidance scale",
            info="how closely to follow the condition; 1 is off",
            visible=actions.kind != "none",
        )
        removals = noise_removals(actions.pipe)
        removal = gr.Radio(
            [(NOISE_REMOVAL_NAMES[name], name) for name in removals], value=removals[0], label="Remove noise by"
        )
        steps = gr.Slider(
            1,
            MOST_STEPS,
            value=actions.pipe.config.num_inference_steps,
            step=1,
            label="Steps",
            info="of the score, down from noise level to noise level",
            visible=actions.pipe.noise_levels is not None,
        )
        decoding = gr.Radio(
            decodings(actions.pipe), value="auto", label="Invert blocks by", info="auto tries them at its first run"
        )
    return scale, removal, steps, decoding


def rebuild_tab(actions: Actions) -> None:
    """The upload on the left, what became of it on the right."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=280):
            upload = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Picture", height=280, buttons=[])
            # Gradio would decode the picture here, before its size is known.
            upload.preprocess = lambda file: None if file is None else file.path
            caption, label = condition_inputs(actions, "optional", required=False)
            button = gr.Button("Encode and rebuild", variant="primary", elem_id="rebuild", interactive=False)
        with gr.Column(scale=7, min_width=280):
            cards = gr.HTML(elem_id="cards")
            numbers = gr.HTML(NOTHING_REBUILT, elem_id="numbers")
    upload.change(actions.look, upload, [cards, numbers, button], show_progress="hidden", queue=False)
    button.click(
        actions.rebuild,
        [upload, caption, label],
        [cards, numbers],
        show_progress="minimal",
        show_progress_on=numbers,
    )


def condition_inputs(
    actions: Actions, placeholder: str | None, first: str | None = None, required: bool = True
) -> tuple[gr.Textbox, gr.Dropdown]:
    """Inputs for a caption, of which ``first`` is there already, and for a class, of which at most one is seen."""
    text = actions.kind == "prefix"
    name = "Prompt" if required else "Its caption"
    caption = gr.Textbox(first, label=name, placeholder=placeholder, max_lines=4, visible=text)
    choices: list[Any] = actions.classes()
    if not required:
        choices = [("no class", None), *choices]
    value = choices[0][1] if choices else None
    label = gr.Dropdown(choices, value=value, label="Class", visible=actions.kind.startswith("class"))
    return caption, label

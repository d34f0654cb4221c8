"""The web page: what it refuses, what it shows while it draws, the way of a picture to noise and back; and the page itself
in a browser."""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import json
import re
import socket
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from decoders import with_decoder
from helpers import ROOT
from PIL import Image
from pipelines import make_pipeline

from tarflow.cli.main import main
from tarflow.common.seeds import image_seed
from tarflow.demo import about, markup, page, screenshot
from tarflow.demo.drawing import MOST_IMAGES, Progress, Request, StoppedError, checked, draw, noise_removals
from tarflow.demo.rebuild import MOST_PIXELS, Rebuilt, noise_picture, read_upload, rebuild
from tarflow.flows.decoding.calibration import calibrate
from tarflow.models import shipped
from tarflow.pipeline.call import inversion
from tarflow.pipeline.call.choices import DECODINGS, STUDENT
from tarflow.pipeline.loading import place
from tarflow.pipeline.opening import open_pipeline

REQUEST = Request(prompt="a red ring", guidance_scale=2.0, decoding="sequential", seed=7, count=2)


def drawn(pipe, request: Request) -> list:
    return list(draw(pipe, checked(pipe, request), threading.Lock(), threading.Event()))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "  \n"}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": "a" * 2000}, "2,000 characters; at most 1,000"),
        ({"count": MOST_IMAGES + 1}, "whole number from 1 to 16"),
        ({"count": 0}, "whole number from 1 to 16"),
        ({"count": 1.5}, "whole number from 1 to 16"),
        ({"count": None}, "whole number from 1 to 16"),
        ({"guidance_scale": 0.5}, "from 1 .off. to 10"),
        ({"guidance_scale": float("nan")}, "from 1 .off. to 10"),
        ({"guidance_scale": None}, "from 1 .off. to 10"),
        ({"seed": -1}, "The seed must be a whole number"),
        ({"seed": 2**32}, "The seed must be a whole number"),
        ({"seed": float("nan")}, "The seed must be a whole number"),
        ({"seed": float("inf")}, "The seed must be a whole number"),
        ({"seed": 0.5}, "The seed must be a whole number"),
        ({"seed": None}, "The seed must be a whole number"),
        ({"decoding": "quick"}, "must be one of auto"),
        ({"noise_removal": "learned"}, "removes noise by score, none"),
    ],
)
def test_bad_requests_are_sentences(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        checked(make_pipeline("prefix"), Request(**{**vars(REQUEST), **change}))


def test_requests_of_too_much_memory_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow.pipeline.call.limits.available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="not even one fits"):
        checked(make_pipeline("prefix"), REQUEST)


@pytest.mark.parametrize("kind", ["prefix", "class_prefix", "none", "pixels"])
def test_a_drawing_is_shown_block_by_block(kind: str) -> None:
    pipe = make_pipeline("none" if kind == "pixels" else kind, vae=kind != "pixels")
    pipe.register_to_config(id2label=None)
    states = drawn(pipe, Request(**{**vars(REQUEST), "label": 1}))
    last, result = states[-1], states[-1].result
    assert [stage.name for stage in last.stages] == ["noise", "block 1", "block 2, raw", "noise removed"]
    counts = [len(state.stages) for state in states]
    assert counts == sorted(counts) and set(counts) >= {1, 2, 3, 4}
    assert [state.result is None for state in states] == [True] * (len(states) - 1) + [False]
    assert all(len(stage.images) == 2 for stage in last.stages)

    conditions = {"prefix": {"prompt": "a red ring"}, "class_prefix": {"class_labels": 1}}
    count = {"num_images_per_prompt": 2} if kind in conditions else {"num_images": 2}
    generator = [torch.Generator().manual_seed(image_seed(7, i)) for i in range(2)]
    scale = 2.0 if kind in conditions else None
    options = {**conditions.get(kind, {}), **count, "guidance_scale": scale, "decoding": "sequential"}
    for image, wanted in zip(result.images, pipe(**options, generator=generator).images, strict=True):
        assert np.abs(np.asarray(image, np.int16) - np.asarray(wanted, np.int16)).max() <= 1
    assert 0 <= max(result.residual_mean) <= max(result.residual_max) < 1e-3
    assert result.seconds > 0 and result.decodings == ["sequential"] * 2


@pytest.mark.parametrize("decoding", [name for name in DECODINGS if name != STUDENT])
def test_decodings_are_named(decoding: str) -> None:
    result = drawn(make_pipeline("none"), Request(decoding=decoding))[-1].result
    names = {name.split(",")[0] for name in result.decodings}
    assert len(result.decodings) == 2
    assert names <= {"sequential", "jacobi", "gs_jacobi"} if decoding in ("auto", "fast") else names == {decoding}
    assert result.calibrated == (decoding in ("auto", "fast"))


@pytest.mark.parametrize("decoding", ["auto", "fast", "sequential"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_trial_of_decodings_is_announced_when_there_is_one(
    decoding: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, trials = make_pipeline("prefix"), []
    if compiled:
        pipe.enable_fast_decoding(None)
    monkeypatch.setattr(inversion, "calibrate", lambda *args: trials.append(1) or calibrate(*args))
    for doubtful, expected in ((False, True), (False, False), (True, True)):  # unknown, known, to be found anew
        for calibration in pipe.calibration_store().calibrations.values():
            calibration.stale = doubtful
        trials.clear()
        states = drawn(pipe, Request("a red ring", guidance_scale=2.0, decoding=decoding, count=2))
        announced = [state for state in states if "trying decodings" in state.message]
        expected = expected and decoding != "sequential"
        assert len(trials) == expected and bool(announced) == states[-1].result.calibrated == expected
        assert all(state.fraction is None for state in announced)
    assert "value=" not in markup.progress(Progress()) and 'value="0.500"' in markup.progress(Progress(fraction=0.5))


def test_a_likelihood_stands_beside_the_mean_of_held_out_pictures() -> None:
    pytest.importorskip("gradio")
    from tarflow.demo.actions import rebuilt_facts

    image = Image.new("RGB", (32, 32))
    rebuilt = Rebuilt(image, image, image, image, 20.04, 1e-6, "latent_nats_per_dim", 0.5, 0.61)
    plain = rebuilt_facts(rebuilt, {})
    assert "held-out" not in plain and "0.500 nats per latent dimension<" in plain
    means = {"latent_nats_per_dim": 0.4, "psnr": 26.2}
    facts = rebuilt_facts(rebuilt, means)
    assert "PSNR 20.0 dB (held-out pictures: 26.2 dB)" in facts and "this one is unlike them" in facts
    assert "0.500 nats per latent dimension (held-out pictures: 0.400)" in facts
    assert "0.610 nats per latent dimension<" in facts
    assert "this one is unlike" not in rebuilt_facts(rebuilt, {"psnr": 21.0})
    facts = rebuilt_facts(rebuilt, {**means, "latent_nats_per_dim_without_condition": 0.45})
    assert "0.610 nats per latent dimension (held-out pictures: 0.450)" in facts
    assert "0.610 nats per latent dimension (held-out pictures: 0.400)" in rebuilt_facts(
        dataclasses.replace(rebuilt, likelihood=None), means
    )


def test_a_bad_upload_is_refused_when_it_is_chosen(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from tarflow.demo.actions import Actions

    actions = Actions(make_pipeline("none"))
    (tmp_path / "bad.png").write_text("no picture")
    Image.new("L", (3, 3)).save(tmp_path / "good.png")
    cards, numbers, button = actions.look(str(tmp_path / "bad.png"))
    assert cards == "" and "Cannot read the image bad.png" in numbers and button["interactive"] is False
    assert actions.look(str(tmp_path / "good.png"))[2]["interactive"] is True
    cards, numbers, button = actions.look(None)
    assert "error" not in numbers and button["interactive"] is False


def test_shipped_cards_speak_of_no_picture_that_the_page_lacks() -> None:
    for name in shipped():
        pipe = SimpleNamespace(config={"_name_or_path": str(ROOT / "models" / name)}, noise_levels=None)
        text = about.card(pipe)
        assert text.startswith(f"# {name}") and "## Licence" in text
        assert "last row" not in text and "below each" not in text and "![" not in text
        assert about.held_out(pipe)["images"] >= 256


def test_decodings_of_compiled_steps_are_named() -> None:
    pipe = make_pipeline("none")
    pipe.enable_fast_decoding(None)
    result = drawn(pipe, Request(decoding="auto"))[-1].result
    assert {name.split(",")[0] for name in result.decodings} <= {"sequential", "jacobi", "gs_jacobi"}
    assert result.calibrated and len(result.decodings) == 2


def test_noise_is_removed_as_asked() -> None:
    pipe = with_decoder(make_pipeline("none", learned_denoiser="unconditional", denoiser_layers=1))
    assert noise_removals(pipe) == ["finetuned", "score", "none", "learned"]
    pipe.register_to_config(decoder="vae")
    assert noise_removals(pipe) == ["score", "none", "learned", "finetuned"]
    ends = {}
    for name in noise_removals(pipe):
        last = drawn(pipe, Request(noise_removal=name, decoding="sequential"))[-1]
        assert len(last.stages) == (3 if name == "none" else 4)
        ends[name] = np.asarray(last.result.images[0]).tobytes()
    assert len(set(ends.values())) == 4
    pipe.register_to_config(denoise=False)
    assert noise_removals(pipe) == ["none", "score", "learned", "finetuned"]
    pipe.register_to_config(noise_std=0.0)
    assert noise_removals(pipe) == ["none"]


def test_the_noise_that_is_shown_is_what_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, shown = make_pipeline("none"), []
    decode = pipe.decode_latents
    monkeypatch.setattr(pipe, "decode_latents", lambda latents, *more: shown.append(latents) or decode(latents, *more))
    for temperature in (1.0, 0.5):
        pipe.register_to_config(temperature=temperature)
        drawn(pipe, Request(decoding="sequential"))
    first, second = shown[0], shown[len(shown) // 2]
    torch.testing.assert_close(second, 0.5 * first)


def test_a_stopped_drawing_ends_before_its_next_block_and_the_next_one_is_drawn() -> None:
    pipe, lock, decoded = make_pipeline("none"), threading.Lock(), []
    seen, go_on, decode = threading.Event(), threading.Event(), pipe.decode_latents

    def slow(latents, *arguments):
        decoded.append(len(latents))
        if len(decoded) == 2:  # after block 1
            seen.set()
            go_on.wait(30)
        return decode(latents, *arguments)

    pipe.decode_latents = slow

    def states(stopped: threading.Event):
        return draw(pipe, checked(pipe, Request(decoding="sequential")), lock, stopped)

    closed, waiting, stopped = states(threading.Event()), states(waits := threading.Event()), threading.Event()
    next(closed)
    assert seen.wait(30)
    next(waiting)
    waits.set()
    with pytest.raises(StoppedError):
        next(waiting)
    closed.close()
    go_on.set()
    assert list(states(stopped))[-1].result is not None and stopped.is_set()
    assert len(decoded) == 2 + 4


def test_stop_reaches_the_run_of_its_own_page_and_no_other() -> None:
    pytest.importorskip("gradio")
    from tarflow.demo.actions import Actions

    actions = Actions(make_pipeline("none"))
    here, there = (SimpleNamespace(session_hash=name) for name in ("here", "there"))
    asked = (None, None, 1, 1, "sequential", "score", 3, None)
    actions.stop(here)  # nothing is drawn
    actions.begin(here)
    actions.begin(there)
    actions.stop(here)
    *_, (status, *_, draw_button, stop) = actions.generate(*asked, here)
    assert "Stopped." in status and draw_button["interactive"] is True and stop["interactive"] is False
    assert "Stopped." not in list(actions.generate(*asked, there))[-1][0]
    actions.begin(here)
    assert "Stopped." not in list(actions.generate(*asked, here))[-1][0]


def test_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    exif = Image.Exif()
    exif[274] = 6
    clear.save(tmp_path / "turned.png", exif=exif)
    image = read_upload(str(tmp_path / "turned.png"))
    assert (image.mode, image.size) == ("RGB", (20, 30))
    assert image.getpixel((19, 0)) == (255, 0, 0) and image.getpixel((5, 5)) == (255, 255, 255)

    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes((tmp_path / "turned.png").read_bytes()[:60])
    for name in ("text.png", "half.png", "none.png"):
        with pytest.raises(ValueError, match=f"cannot read the image {name}"):
            read_upload(str(tmp_path / name))
    with pytest.raises(ValueError, match="Choose a picture"):
        read_upload(None)

    monkeypatch.setattr("tarflow.demo.rebuild.read_image", None)  # a large picture is never decoded
    assert MOST_PIXELS < 8000 * 6250
    Image.new("1", (8000, 6250)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"8,000 × 6,250 pixels, 50 million; at most 40 million"):
        read_upload(str(tmp_path / "large.png"))
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png"):
        read_upload(str(tmp_path / "bomb.png"))


@torch.no_grad()
def test_encode_and_rebuild() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    pipe = make_pipeline("prefix")
    rebuilt = rebuild(pipe, image, caption="a red ring")
    assert rebuilt.fitted.size == rebuilt.reconstruction.size == rebuilt.round_trip.size == (32, 32)
    assert rebuilt.error < 1e-4
    assert rebuilt.quantity == "latent_nats_per_dim" and rebuilt.likelihood != rebuilt.likelihood_alone
    pixels, decoded = (np.asarray(part, np.float64) for part in (rebuilt.fitted, rebuilt.reconstruction))
    assert rebuilt.psnr == pytest.approx(10 * np.log10(255**2 / ((pixels - decoded) ** 2).mean()), abs=1e-3)
    assert np.abs(np.asarray(rebuilt.round_trip, int) - np.asarray(rebuilt.reconstruction, int)).max() <= 1
    assert rebuild(pipe, image).likelihood is None
    assert rebuild(pipe, image).likelihood_alone == rebuilt.likelihood_alone
    assert rebuild(make_pipeline(), image, label=2).likelihood is not None

    of_pixels = rebuild(make_pipeline("none", vae=False), image)
    assert of_pixels.reconstruction is of_pixels.psnr is of_pixels.likelihood is None
    assert of_pixels.quantity == "bits_per_dim" and of_pixels.noise.mode == "RGB"
    assert np.abs(np.asarray(of_pixels.round_trip, int) - np.asarray(of_pixels.fitted, int)).max() <= 1


def test_noise_as_a_picture() -> None:
    z = torch.zeros(8, 2, 3)
    z[1, 0, 2] = 9.0  # first row of tiles, second tile
    grey = np.asarray(noise_picture(z))
    assert grey.shape == (4, 12) and grey[0, 5] == 255 and (grey == 128).sum() == 47


def test_what_is_told_of_a_pipeline(tmp_path: Path) -> None:
    folder = tmp_path / "fruit" / "pipeline"
    pipe = make_pipeline("prefix")
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\ntags: x\n---\n# Fruit\n\n![p](https://x/y.png)\nAs the picture shows.\n\n![q](own.png) *good*\n\n"
        "<b>bad</b> ![r](../outside.png)\n\n<img src='z'> too\n\n![s][1] too\n\nThe <i>end</i>"
    )
    for file in (folder / "own.png", folder.parent / "outside.png"):
        Image.new("L", (1, 1)).save(file)
    (folder / "examples.json").write_text(json.dumps(["a red ring", "", 3]))
    assert about.name_of(pipe) == "a pipeline" and about.card(pipe) == "" and about.examples(pipe) == []
    pipe = type(pipe).from_pretrained(folder)
    assert about.name_of(pipe) == "fruit"
    assert re.sub(r"base64,[\w+/=]+", "…", about.card(pipe)) == "# Fruit\n\n![q](data:image/png;…) *good*\n\nThe end"
    assert about.examples(pipe) == ["a red ring"]
    details = dict(about.details(pipe))
    assert details["temperature of the noise"] == "1"
    assert details["training noise σ"] == "0.3" and "vae 3.1 million" in details["parameters"]
    assert "held-out pictures" not in details and about.held_out(pipe) == {}
    (folder / "held_out.json").write_text('{"latent_nats_per_dim": 0.4321, "images": 1200, "psnr": 26, "a": "b"}')
    assert about.held_out(pipe) == {"latent_nats_per_dim": 0.4321, "images": 1200.0, "psnr": 26.0}
    words = dict(about.details(pipe))["held-out pictures"]
    assert words == "0.432 nats per latent dimension, the mean over 1,200 pictures"
    for damaged in ("{", '{"a": [1]}', "3", '{"psnr": NaN}'):
        for name in ("examples.json", "held_out.json"):
            (folder / name).write_text(damaged)
        assert about.examples(pipe) == [] and about.held_out(pipe) == {}


def test_starting_it_fails_in_one_sentence(tmp_path, monkeypatch, capsys) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["demo", *arguments])
        assert left.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gradio", None)
        assert "pip install 'tarflow[demo]'" in refused()
    pytest.importorskip("gradio")
    monkeypatch.setattr(place, "shipped", tuple)
    assert "make quickstart" in refused()
    assert "no pipeline 'nowhere'" in refused("--pipeline", "nowhere", "--port", str(screenshot.free_port()))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        assert f"cannot listen at port {taken}" in refused("--pipeline", "owner/nowhere", "--port", taken)
    assert "--port must be 1 to 65535" in refused("--pipeline", "nowhere", "--port", "70000")
    monkeypatch.setattr(place, "shipped", lambda: ("emoji",))
    assert place.default_pipeline() == "emoji"


def test_actions_turn_errors_into_sentences_and_go_on() -> None:
    pytest.importorskip("gradio")
    from tarflow.demo.actions import Actions

    actions = Actions(make_pipeline("prefix"))
    inputs = (None, 2.0, 2, "sequential", "score", 5)
    status, pictures, strip, download, draw_button, stop = list(actions.generate(" ", *inputs))[-1]
    assert "the prompt is empty" in status
    assert "<img" not in pictures and "block by block" in pictures and strip == ""  # those of a run before are gone
    assert download["visible"] is False and draw_button["interactive"] is True and stop["interactive"] is False
    prepare, actions.pipe.prepare_latents = actions.pipe.prepare_latents, None
    assert "The run failed: " in list(actions.generate("a <b>ring", *inputs))[-1][0]
    assert "Choose a picture first." in actions.rebuild(None, "", None)[1]
    actions.pipe.prepare_latents = prepare
    *_, (status, pictures, strip, download, *_) = actions.generate("a <b>ring", *inputs)
    assert "largest" in status and pictures.count("<img") == 2 and strip.count("<img") == 4
    assert '<p class="told">a &lt;b&gt;ring<span>, guidance scale 2</span></p>' in pictures
    assert [f"seed 5, image {number}</figcaption>" in pictures for number in (1, 2, 3)] == [True, True, False]
    with zipfile.ZipFile(download["value"]) as archive:
        assert archive.namelist() == ["drawing-5-0.png", "drawing-5-1.png"]
        image = Image.open(archive.open("drawing-5-1.png"))
        assert image.size == (32, 32) and image.text["Description"] == "a <b>ring, seed 5, image 2"


def test_the_page_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw, refuse, upload, stop; and neither the browser nor the server asks another host for anything."""
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    from tarflow.demo.actions import Actions

    if screenshot.browser() is None:
        pytest.skip(f"no browser: none of {', '.join(screenshot.BROWSERS)} is installed")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    hosts = set()
    connect = socket.socket.connect

    def recorded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            hosts.add(address[0])
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    (tmp_path / "broken.png").write_text("no picture")
    Image.new("RGBA", (50, 40), (0, 90, 200, 120)).save(tmp_path / "good.png")
    folder = tmp_path / "rings" / "pipeline"
    make_pipeline("prefix").save_pretrained(folder)
    (folder / "README.md").write_text("# Rings\n\n![far](https://example.com/far.png)\n\n![near](near.png)")
    Image.new("RGB", (9, 9)).save(folder / "near.png")
    (folder / "examples.json").write_text('["a red ring", "a blue star"]')
    pipe = open_pipeline(str(folder), "cpu")
    answer, begin, begun = threading.Event(), Actions.begin, []
    answer.set()

    @functools.wraps(begin)  # Gradio reads its annotations
    def late(actions, opened):
        begun.append(time.monotonic())
        return begin(actions, opened) if answer.wait(20) else None

    monkeypatch.setattr(Actions, "begin", late)
    app = page.start(page.build(pipe), "127.0.0.1", screenshot.free_port())
    try:
        with screenshot.opened(app.local_url, 1280, 900) as view:
            view.set_default_timeout(60_000)
            view.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
            view.reload()
            view.wait_for_selector("#draw")
            assert view.get_by_label("Prompt").input_value() == "a red ring"
            assert view.locator("#stop").is_disabled() and not view.get_by_label("Guidance scale").first.is_visible()
            screenshot.draw(view, None, 3, 2)
            assert "largest" in view.inner_text("#status")
            assert view.locator("#pictures img").count() == 2 and view.locator("#strip figure").count() == 4
            assert "a red ring" in view.inner_text("#pictures") and "seed 3, image 2" in view.inner_text("#pictures")
            view.wait_for_selector("#draw:enabled")
            assert view.locator("#stop").is_disabled()
            view.get_by_label("Prompt").fill("")
            screenshot.press(view, "#draw", "#status")
            assert "the prompt is empty" in view.inner_text("#status .error")
            view.wait_for_selector("#draw:enabled")
            assert view.locator("#pictures img").count() == view.locator("#strip img").count() == 0
            assert not view.locator("#download").is_visible()
            before = len(begun)
            stopped_in(view, pipe, answer)
            assert len(begun) == before + 1
            screenshot.draw(view, "a red ring", 3, 2)
            with view.expect_download() as download:
                view.click("#download")
            assert zipfile.is_zipfile(download.value.path())
            choose_in(view, tmp_path / "broken.png")
            assert "Cannot read the image broken.png" in view.locator("#numbers .error").inner_text()
            assert view.locator("#rebuild").is_disabled()
            view.get_by_label("Clear").or_(view.get_by_label("Remove Image")).first.click()
            view.wait_for_selector("#numbers .empty")
            choose_in(view, tmp_path / "good.png")
            view.wait_for_selector("#rebuild:enabled")
            screenshot.press(view, "#rebuild", "#numbers")
            view.wait_for_selector("#cards figure")
            assert view.locator("#cards figure").count() == 4 and "PSNR" in view.inner_text("#numbers")
            view.get_by_role("tab", name="About").click()
            view.wait_for_function("() => document.querySelector('img[alt=near]')?.naturalWidth === 9")
            view.set_viewport_size({"width": 390, "height": 900})
            view.get_by_role("tab", name="Generate").click()
            tops = [view.locator(place).bounding_box()["y"] for place in ("#draw", "#result", "#seed", "#more")]
            assert tops == sorted(tops)
        assert list((tmp_path / "uploads").rglob("good.png"))
    finally:
        app.close(verbose=False)
    assert all(host == "localhost" or ipaddress.ip_address(host).is_loopback for host in hosts - {""}), hosts
    until = time.monotonic() + 20  # the server is given up on after 5 seconds, but goes on to its end
    while left := [file for file in (tmp_path / "uploads").rglob("*") if file.is_file()]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


def stopped_in(view, pipe, answer: threading.Event) -> None:
    """Draw by Enter, which cannot be pressed again even before the server answers, and stop in the middle."""
    go_on, decode = threading.Event(), pipe.decode_latents

    def slow(*arguments):
        go_on.wait(20)
        return decode(*arguments)

    pipe.decode_latents = slow
    try:
        view.get_by_label("Prompt").fill("a red ring")
        answer.clear()
        view.get_by_label("Prompt").press("Enter")
        view.wait_for_selector("#draw:disabled")
        view.get_by_label("Prompt").press("Enter")
        answer.set()
        view.wait_for_selector("#stop:enabled")
        assert view.locator("#draw").is_disabled()
        view.get_by_label("Prompt").press("Enter")
        view.wait_for_selector("#status .progress")
        view.click("#stop")
        view.wait_for_selector("#status .note")
        assert view.inner_text("#status .note") == "Stopped."
        view.wait_for_selector("#draw:enabled")
        assert view.locator("#stop").is_disabled()
    finally:
        answer.set()
        go_on.set()
        pipe.decode_latents = decode


def choose_in(view, file: Path) -> None:
    """Upload a file on the page and wait for what is said of it."""
    view.get_by_role("tab", name="Encode and rebuild").click()
    with view.expect_response(lambda response: "/upload" in response.url):
        view.locator("input[type=file]").first.set_input_files(file)
    view.wait_for_timeout(300)

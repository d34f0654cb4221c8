"""TARFlowPipeline as a user calls it: save, load, conditions, generators, output types, bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pipelines import CAPTIONS, draw, make_pipeline

from tarflow import TARFlowPipeline
from tarflow.flows.decoding.method import Decoding
from tarflow.flows.model import TARFlowModel as DefiningClass
from tarflow.pipeline.call.inputs import label_indices


def test_save_and_load_give_the_same_images(tmp_path):
    pipe = make_pipeline("prefix")
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.flow, DefiningClass)
    assert isinstance(loaded.vae, AutoencoderKL)
    options = {"guidance_scale": 2.0, "decoding": "sequential"}  # each pipeline would calibrate for itself
    images = draw(pipe, CAPTIONS, **options)
    np.testing.assert_allclose(draw(loaded, CAPTIONS, **options), images, rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_class_labels_by_index_and_name(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    options = {"guidance_scale": 2.0, "decoding": "sequential"}
    by_index = draw(pipe, class_labels=[0, 2], **options)
    by_name = draw(loaded, class_labels=["tench", "Gas Pump"], **options)
    np.testing.assert_allclose(by_name, by_index, rtol=0, atol=1e-5)
    assert not np.array_equal(by_index, draw(pipe, class_labels=[1, 1], **options))


def test_image_i_does_not_depend_on_the_batch():
    pipe = make_pipeline("prefix")
    both = draw(pipe, CAPTIONS, guidance_scale=3.0)
    alone = draw(pipe, CAPTIONS[1], seeds=(2,), guidance_scale=3.0)
    assert np.abs(both[1] - alone[0]).max() < 1e-4
    several = draw(pipe, CAPTIONS[1], seeds=(5, 2), num_images_per_prompt=2, guidance_scale=3.0)
    assert np.abs(both[1] - several[1]).max() < 1e-4


def test_guidance_and_negative_prompt():
    pipe = make_pipeline("prefix")
    close = {"rtol": 0, "atol": 1e-5}
    exact = {"decoding": "sequential"}
    plain = draw(pipe, CAPTIONS, **exact)
    unguided = draw(pipe, CAPTIONS, guidance_scale=1.0, negative_prompt="", **exact)
    np.testing.assert_allclose(unguided, plain, **close)
    with pytest.raises(
        ValueError, match="negative_prompt has no effect without guidance, and guidance_scale is 1: take"
    ):
        draw(pipe, CAPTIONS, guidance_scale=1.0, negative_prompt="a blue ring")
    guided = draw(pipe, CAPTIONS, guidance_scale=4.0, **exact)
    assert not np.allclose(plain, guided, **close)
    empty = draw(pipe, CAPTIONS, guidance_scale=4.0, negative_prompt="", **exact)
    np.testing.assert_allclose(empty, guided, **close)
    for other in ({"negative_prompt": "a blue ring"}, {"guidance_method": "linear"}):
        assert not np.allclose(guided, draw(pipe, CAPTIONS, guidance_scale=4.0, **other, **exact), **close)


def test_embeddings_and_given_noise():
    pipe = make_pipeline("prefix")
    embeds, null = pipe.encode_prompt(CAPTIONS, torch.device("cpu"))
    assert embeds.shape == null.shape == (2, 8, 16)
    assert (embeds[0, 4:] == 0).all()  # "a red ring" and the end token, then padding
    noise = torch.randn(2, 8, 4, 4)
    options = {"latents": noise, "guidance_scale": 2.0, "output_type": "latent"}
    by_text = pipe(CAPTIONS, **options).images
    by_embeds = pipe(prompt_embeds=embeds, negative_prompt_embeds=null, **options).images
    assert torch.allclose(by_text, by_embeds, atol=1e-5)


def test_output_types_and_other_sizes():
    pipe = make_pipeline("none")
    assert draw(pipe, num_images=2, output_type="pil")[1].size == (32, 32)
    assert draw(pipe, num_images=2, output_type="pt").shape == (2, 3, 32, 32)
    assert draw(pipe, num_images=2, output_type="latent").shape == (2, 8, 4, 4)
    assert draw(pipe, num_images=2, height=16, width=64).shape == (2, 16, 64, 3)
    assert isinstance(pipe(return_dict=False), tuple)
    raw, denoised = (draw(pipe, num_images=2, denoise=flag, output_type="latent") for flag in (False, True))
    assert not torch.equal(raw, denoised)


def test_pixel_model_and_bfloat16():
    assert draw(make_pipeline("none", vae=False), num_images=2).shape == (2, 4, 4, 3)
    pipe = make_pipeline("prefix").to(torch.bfloat16)
    images = draw(pipe, CAPTIONS, guidance_scale=2.0)
    assert np.isfinite(images).all()


def test_callback_and_offload():
    pipe, seen = make_pipeline(), []

    def callback(pipeline, index, step, tensors):
        seen.append((index, tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * 0} if index == 1 else {}

    changed = draw(pipe, class_labels=[0, 1], callback_on_step_end=callback, output_type="latent", denoise=False)
    assert seen == [(0, (2, 8, 4, 4)), (1, (2, 8, 4, 4))]
    assert (changed == 0).all()
    images = draw(pipe, class_labels=[0, 1], decoding="sequential")
    pipe.enable_model_cpu_offload(device="cpu")
    offloaded = draw(pipe, class_labels=[0, 1], decoding="sequential")
    np.testing.assert_allclose(offloaded, images, rtol=0, atol=1e-5)


def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "old")
    before = sorted(path.name for path in (tmp_path / "old").rglob("*"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", full)
    for name in ("old", "new"):
        with pytest.raises(OSError, match=r"cannot write .*No space left"):
            pipe.save_pretrained(tmp_path / name)
    assert sorted(path.name for path in (tmp_path / "old").rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


GENERATORS = [torch.Generator().manual_seed(0)] * 3


@pytest.mark.parametrize(
    ("conditioning", "arguments", "message"),
    [
        ("prefix", {}, "draws from captions: give prompt"),
        ("prefix", {"prompt": "a", "class_labels": 1}, "either prompt or class_labels"),
        ("prefix", {"class_labels": 1}, "draws from captions"),
        ("prefix", {"prompt": 3}, "must be a text or a list of texts, got 3"),
        ("prefix", {"prompt": "a", "prompt_embeds": torch.zeros(1, 8, 16)}, "either prompt or prompt_embeds"),
        ("prefix", {"prompt": "a", "negative_prompt": ["a", "b"], "guidance_scale": 2.0}, "2 texts for 1 prompts"),
        ("prefix", {"prompt": ["a", "b"], "generator": GENERATORS}, "got 3 generators for 2 images"),
        ("prefix", {"prompt": "a", "guidance_scale": 0.5}, r"guidance_scale must be at least 1 \(off\), got 0\.5"),
        ("prefix", {"prompt": "a", "guidance_method": "x"}, "must be one of gaussian, linear, linear_scale, got 'x'"),
        ("class_prefix", {}, "give class_labels, 0 to 2"),
        ("class_prefix", {"class_labels": 3}, "class labels must be 0 to 2, got 3"),
        ("class_prefix", {"class_labels": "cat"}, "unknown class name 'cat'; known are tench, church, gas pump"),
        ("class_prefix", {"prompt": "a"}, "takes no prompt"),
        ("none", {"class_labels": 1}, "takes no class_labels"),
        ("none", {"height": 30}, "height must be a positive multiple of 8, got 30"),
        ("none", {"latents": torch.zeros(1, 8, 3, 4)}, "latents must have the shape"),
        ("none", {"callback_on_step_end_tensor_inputs": ["z"]}, "may name latents, got 'z'"),
    ],
)
def test_bad_input(conditioning, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(conditioning)(**arguments)


@pytest.mark.parametrize("options", [{"positions": "learned"}, {"deep_order": "coarse_to_fine"}])
def test_learned_positions_have_one_size(options):
    with pytest.raises(ValueError, match="width must be 32 with learned positions, got 64"):
        make_pipeline("none", **options)(width=64)


@pytest.mark.parametrize("name", ["emojy", "runs/mine/pipelin"])
def test_a_mistyped_name_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=f"there is no pipeline '{name}': give its folder, a shipped name"):
        TARFlowPipeline.from_pretrained(name)


WHOLE, NUMBER, SWITCH, TENSOR = "a whole number", "a number", "True or False", "a tensor"
TEXTS, GENERATOR = "a text or a list of texts", "a torch.Generator"
IMAGE = torch.zeros(1, 3, 32, 32)


def wrong_arguments():
    """Methods with an argument of a wrong type, and what is expected instead."""
    call = {
        WHOLE: {"height": 32.0, "width": "64", "num_images_per_prompt": None, "num_images": True, "segment": "2"},
        NUMBER: {
            "guidance_scale": True,
            "temperature": "x",
            "tolerance": [1],
            "noise_level": "1",
            "attention_temperature": "",
        },
        SWITCH: {"guidance_annealed": "no", "return_dict": 2, "return_residual": None},
        TENSOR: {"latents": [0.0], "prompt_embeds": "a", "negative_prompt_embeds": np.zeros(2)},
        TEXTS: {"prompt": ["a", 3], "negative_prompt": 5},
        GENERATOR: {"generator": 5},
        "a function": {"callback_on_step_end": "x"},
        "a list of texts": {"callback_on_step_end_tensor_inputs": "latents"},
        "a name, a Decoding, or a list": {"decoding": 5},
    }
    for words, values in call.items():
        for name, value in values.items():
            yield "__call__", {name: value}, f"{name} must be {words}"
    for name in ("num_inference_steps", "max_sequence_length"):
        yield "__call__", {name: "4"}, f"{name} must be a whole number, got '4'"
    yield "__call__", {"guidance_scale": "a"}, "guidance_scale must be a number, got 'a'"
    yield "__call__", {"class_labels": [1.5]}, r"class_labels must be numbers or names of classes.*got \[1.5\]"
    yield "__call__", {"class_labels": torch.tensor([1, 2])}, "class_labels must be numbers or names of classes"
    for method in ("encode", "log_likelihood"):
        yield method, {"image": IMAGE, "noise": "no"}, "noise must be True or False, got 'no'"
        yield method, {"image": IMAGE, "generator": 1}, r"generator must be a torch.Generator, got 1: give .*seed\(1\)"
    yield "encode", {"image": "a.png"}, "an image must be a PIL picture"
    yield "interpolate", {"first": IMAGE, "second": IMAGE, "steps": "8"}, "steps must be a whole number, got '8'"
    yield "vary", {"image": IMAGE, "strength": "0.4"}, "strength must be a number, got '0.4'"
    yield "swap", {"image": IMAGE, "target_prompt": 3}, "target_prompt must be a text or a list of texts, got 3"
    yield "inpaint", {"image": IMAGE, "mask": "x"}, "the mask must be a PIL picture, a tensor or an array, got 'x'"
    yield "inpaint", {"image": IMAGE, "mask": IMAGE, "passes": 1.5}, "passes must be a whole number, got 1.5"
    yield "best_of", {"num": "4"}, "num must be a whole number, got '4'"
    yield "best_of", {"num": 2, "guidance_scale": "4"}, "guidance_scale must be a number, got '4'"
    yield "encode_prompt", {"prompt": 3}, "prompt must be a text or a list of texts, got 3"
    yield "remove_noise", {"latents": IMAGE, "denoise": True, "noise_level": "1"}, "noise_level must be a number"


def test_arguments_of_a_wrong_type_are_named():
    pipe = make_pipeline()
    for method, arguments, message in wrong_arguments():
        if method == "__call__" and "class_labels" not in arguments:
            arguments = {"class_labels": 1, **arguments}
        with pytest.raises(ValueError, match=message):
            getattr(pipe, method)(**arguments)
    for name, value in (("num_inference_steps", 2.5), ("max_sequence_length", "16"), ("denoise", "no")):
        with pytest.raises(ValueError, match=f"{name} must be (a whole number|True or False), got {value!r}"):
            TARFlowPipeline(pipe.flow, **{name: value})
    for name in ("tolerance", "segment"):
        with pytest.raises(ValueError, match=f"the decoding {name} must be"):
            Decoding("gs_jacobi", **{"segment": 2, name: "x"})


def test_numbers_of_other_libraries_are_numbers():
    numbers = {"height": np.int64(32), "guidance_scale": np.float32(1), "return_dict": np.True_, "return_residual": 0}
    assert (
        make_pipeline()(class_labels=[np.int64(1), torch.tensor(2)], output_type="pt", **numbers).images.shape[0] == 2
    )


def test_a_wrong_name_among_many_classes():
    names = {f"class {index}, kind of thing": index for index in range(999)} | {"tench, Tinca tinca": 999}
    for name, near in (("tinca", "'tench, Tinca tinca'"), ("Tench, Tinka tinca", "'tench, Tinca tinca'")):
        with pytest.raises(ValueError, match=f"{name!r}; did you mean {near}. pipe.labels has all 1,000 names"):
            label_indices(name, names, 1000)
    with pytest.raises(ValueError, match=r"'xyz'; pipe\.labels has all 1,000 names"):
        label_indices("xyz", names, 1000)


def test_embeddings_of_another_length():
    pipe = make_pipeline("prefix")
    short, _ = pipe.encode_prompt(CAPTIONS, max_sequence_length=6)
    options = {"guidance_scale": 2.0, "decoding": "sequential"}
    images = draw(pipe, prompt_embeds=short, **options)
    by_text = draw(pipe, CAPTIONS, max_sequence_length=6, **options)
    np.testing.assert_allclose(images, by_text, rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"negative_prompt_embeds has \(8, 16\) numbers a row, and prompt_embeds \(6, 16\)"
    ):
        draw(pipe, prompt_embeds=short, negative_prompt_embeds=pipe.encode_prompt("")[0], **options)


def test_lists_of_generators():
    pipe = make_pipeline(vae=False, sample_size=16)
    pictures = [torch.rand(3, 16, 16) for _ in range(3)]
    one, two = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"generator is a tuple.*give list\(generator\)"):
        pipe(class_labels=[0, 1], generator=(one, two))
    with pytest.raises(ValueError, match=r"must be a torch\.Generator, got None"):
        pipe(class_labels=[0, 1], generator=[None, two])
    with pytest.raises(ValueError, match="got 2 generators for 3 images"):
        pipe.encode(torch.stack(pictures), class_labels=[0, 1, 2], generator=[one, two])
    with pytest.raises(ValueError, match="got 2 generators for 3 images"):
        pipe.vary(torch.stack(pictures), 0.5, class_labels=[0, 1, 2], generator=[one, two], noise=False)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:4] = True
    with pytest.raises(ValueError, match="generator"):
        pipe.inpaint(torch.stack(pictures), mask, class_labels=[0, 1, 2], generator=[one, two], noise=False)


def test_an_interpolation_has_two_ends():
    pipe = make_pipeline(vae=False, sample_size=16)
    pictures = torch.rand(3, 3, 16, 16)
    with pytest.raises(ValueError, match="first and second are one picture each, got 3 together"):
        pipe.interpolate(pictures[:2], pictures[2], class_labels=0)


def test_embeddings_without_rows_or_axes():
    pipe = make_pipeline("prefix")
    embeds = pipe.encode_prompt(CAPTIONS)[0]
    for wrong in (embeds[:0], embeds[0]):
        with pytest.raises(ValueError, match=r"prompt_embeds must be \(captions, tokens, numbers\), none of them 0"):
            pipe(prompt_embeds=wrong, guidance_scale=2.0)


def test_a_callback_returns_latents_of_the_same_shape():
    pipe = make_pipeline()
    for wrong in (lambda latents: latents[:1], lambda latents: latents[0, 0]):
        with pytest.raises(ValueError, match=r"the callback returned latents of the shape .*, expected \(2, 8, 4, 4\)"):
            draw(
                pipe,
                class_labels=[0, 1],
                callback_on_step_end=lambda p, i, t, own, w=wrong: {"latents": w(own["latents"])},
            )


def test_half_precision_that_overflows_is_no_black_picture():
    pipe = make_pipeline("none")
    pipe.vae = copy.deepcopy(pipe.vae)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(3e4)
        pipe.vae.decoder.conv_in.bias.mul_(3e4)
    assert np.isfinite(draw(pipe, num_images=2)).all()
    pipe.to(torch.float16)
    with pytest.raises(FloatingPointError, match=r"float16 cannot hold: decode in float32, pipe\.vae\.float\(\)"):
        draw(pipe, num_images=2)
    pipe.vae.float()
    assert np.isfinite(draw(pipe, num_images=2)).all()


def test_pictures_of_every_mode_for_the_tools():
    pipe = make_pipeline(vae=False, sample_size=16)
    grey = np.linspace(0, 255, 256).round().astype(np.uint8).reshape(16, 16)
    forms = {
        "8 bits": Image.fromarray(grey),
        "16 bits": Image.fromarray(grey.astype(np.uint16) * 257),
        "floats": Image.fromarray(grey.astype(np.float32) / 255),
    }
    found = [pipe.log_likelihood(form, class_labels=0, noise=False).log_prob for form in forms.values()]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    picture = forms["8 bits"].convert("RGB")
    dark = np.full((16, 16), 500, np.uint16)
    dark[0, 0] = 65535
    filled = pipe.inpaint(picture, Image.fromarray(dark), class_labels=0, output_type="np").images[0]
    changed = np.abs(filled - np.asarray(picture) / 255).max(-1) > 0.02
    assert not changed[8:, 8:].any()
    with pytest.raises(ValueError, match="the image cannot be read: its floats reach from 0 to 255"):
        pipe.encode(Image.fromarray(grey.astype(np.float32)), class_labels=0)


def test_no_pictures_and_pictures_of_several_sizes_are_a_sentence():
    pipe = make_pipeline(vae=False, sample_size=16)
    with pytest.raises(ValueError, match="there is no image in the list"):
        pipe.encode([])
    with pytest.raises(ValueError, match="the image has 8 × 8 pixels, the model takes 16 × 16"):
        pipe.encode([Image.new("RGB", (16, 16)), Image.new("RGB", (8, 8))], class_labels=[0, 1])

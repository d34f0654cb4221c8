"""Settings and arguments that cannot be meant, each with its sentence; and parts of a pipeline that agree on what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adapters import add, arguments, pipeline
from pipelines import CAPTIONS, draw, make_pipeline
from students import small_student, with_student

from tarflow import TARFlowPipeline
from tarflow.flows.decoding.method import Decoding
from tarflow.pipeline.call.defaults import checked_settings
from tarflow.pipeline.conditions import condition_of

LATENT: dict[str, Any] = {"output_type": "latent", "decoding": "sequential"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "finetunned"}, "decoder must be 'vae' or 'finetuned', got 'finetunned'"),
        ({"guidance_scale": 0.5}, r"guidance_scale must be at least 1 \(off\), got 0.5"),
        ({"guidance_scale": float("inf")}, r"guidance_scale must be at least 1 \(off\), got inf"),
        ({"guidance_method": "x"}, "the guidance method must be one of gaussian, linear, linear_scale, got 'x'"),
        ({"noise_std": -1.0}, "noise_std must be 0 or positive, got -1"),
        ({"noise_std": float("nan")}, "noise_std must be 0 or positive, got nan"),
        ({"max_sequence_length": 0}, "max_sequence_length must be at least 1, got 0"),
        ({"latents_std": [float("nan")] * 8}, "latents_std must be finite numbers"),
        ({"latents_std": [0.0] * 8}, r"latents_std must be positive, got \[0.0"),
        ({"latents_mean": "none"}, "latents_mean must be finite numbers, one for each channel, got 'none'"),
        ({"id2label": ["a", "b", "c"]}, "id2label must be a dictionary of names by number, got list"),
        ({"id2label": {"a": "b"}}, "id2label must have the classes' numbers as keys, got 'a'"),
        ({"caption_template": "hello"}, r"caption_template has no place \{prompt\}, where the caption goes: 'hello'"),
        ({"num_inference_steps": 2}, "num_inference_steps is 2, but this flow knows one noise level"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=message):
        TARFlowPipeline(pipe.flow, pipe.vae, **settings)


def test_numbers_of_libraries_are_kept_as_plain_ones(tmp_path) -> None:
    pipe = make_pipeline()
    given = {"noise_std": np.float32(0.25), "guidance_scale": np.float64(2), "max_sequence_length": np.int64(7)}
    statistics = {"latents_mean": torch.full((8,), 0.5), "latents_std": np.ones(8, dtype=np.float32)}
    names = {np.int64(0): "a", np.int64(2): "b"}
    made = TARFlowPipeline(pipe.flow, pipe.vae, **given, **statistics, denoise=np.bool_(False), id2label=names)
    made.save_pretrained(tmp_path)
    loaded = TARFlowPipeline.from_pretrained(tmp_path).config
    assert (loaded.noise_std, loaded.guidance_scale, loaded.max_sequence_length) == (0.25, 2, 7)
    assert (loaded.latents_mean, loaded.latents_std, loaded.denoise) == ([0.5] * 8, [1.0] * 8, False)
    assert {int(number): name for number, name in loaded.id2label.items()} == {0: "a", 2: "b"}


def test_a_default_that_was_changed_later_is_looked_at_too() -> None:
    pipe = make_pipeline()
    pipe.register_to_config(decoder="finetunned")
    with pytest.raises(ValueError, match="decoder must be 'vae' or 'finetuned', got 'finetunned'"):
        pipe(class_labels=1)


def test_every_block_keeps_its_own_tolerance() -> None:
    pipe = make_pipeline()
    asked = [Decoding("auto", 0.5), Decoding("auto", 1e-5)]
    options = {"class_labels": [1, 2], "output_type": "latent", "latents": torch.randn(2, 8, 4, 4)}
    found = draw(pipe, decoding=asked, **options)
    assert pipe.decodings is not None
    assert [one.tolerance for one in pipe.decodings] == [0.5, 1e-5]
    assert found.shape == draw(pipe, decoding="sequential", **options).shape


class TestNoiseAndDecoder:
    def test_none_removes_nothing(self) -> None:
        pipe, latents = make_pipeline("none"), torch.randn(2, 8, 4, 4)
        assert torch.equal(pipe.remove_noise(latents, "none"), latents)
        assert not torch.equal(pipe.remove_noise(latents, "score"), latents)

    @pytest.mark.parametrize(
        ("denoise", "message"),
        [("scroe", "denoise must be None, True, False"), ("learned", "this model has no learned denoiser")],
    )
    def test_unknown_ways_are_refused(self, denoise: str, message: str) -> None:
        pipes = (make_pipeline("none"), make_pipeline("none", noise_levels=(0.1, 0.8), noise_conditioning=True))
        for pipe in pipes:
            with pytest.raises(ValueError, match=message):
                pipe.remove_noise(torch.randn(1, 8, 4, 4), denoise)

    @pytest.mark.parametrize(
        ("decoder", "message"), [("fintuned", "decoder must be"), ("finetuned", "has no finetuned decoder")]
    )
    def test_decoders_that_are_not_there(self, decoder: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_pipeline("none").decode_latents(torch.zeros(1, 8, 4, 4), decoder)


class TestNotFinite:
    def test_a_students_numbers(self) -> None:
        pipe = with_student(make_pipeline("none"))
        with pytest.raises(FloatingPointError, match="not finite, made by the student"):
            pipe(decoding="student", latents=torch.full((1, 8, 4, 4), torch.nan))

    @pytest.mark.parametrize("block", [0, 1])
    def test_a_callbacks_numbers(self, block: int) -> None:
        def spoil(pipe: Any, index: int, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"latents": tensors["latents"] * torch.nan} if index == block else {}

        with pytest.raises(FloatingPointError, match="not finite, made by the callback"):
            make_pipeline("none")(callback_on_step_end=spoil)

    def test_the_score_steps_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tarflow.pipeline.call.samples.score_denoise", lambda flow, x, *_, **__: x / 0)
        with pytest.raises(FloatingPointError, match="not finite, made by removing the training noise"):
            make_pipeline("none")()


class TestCallbacks:
    def nested(self, scale: float) -> tuple[Any, Any, Any]:
        """A call without a callback, one whose callback draws a preview, and what the latter saw."""
        pipe = make_pipeline("class_vectors", condition_blocks="all")
        options = {"class_labels": [0, 1], "guidance_scale": 4.0, "latents": torch.randn(2, 8, 4, 4), **LATENT}
        seen = []

        def preview(pipe: Any, index: int, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe(class_labels=2, guidance_scale=scale, **LATENT)
            seen.append((pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt))
            return {}

        plain = pipe(**options).images
        return plain, pipe(callback_on_step_end=preview, **options).images, seen

    @pytest.mark.parametrize("scale", [1.0, 2.0])
    def test_a_preview_changes_nothing_of_the_call_around_it(self, scale: float) -> None:
        plain, found, seen = self.nested(scale)
        assert torch.equal(found, plain)
        assert seen == [(4.0, 2, False)] * 2

    def test_another_threads_call_does_not_either(self) -> None:
        """As if it began between two blocks: what it sets on the pipeline is not taken over."""
        pipe = make_pipeline("class_vectors", condition_blocks="all")
        options = {"class_labels": [0, 1], "guidance_scale": 4.0, "latents": torch.randn(2, 8, 4, 4), **LATENT}
        plain = pipe(**options).images
        seen = []

        def look(pipe: Any, index: int, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(pipe.guidance_scale)
            return {}

        run = pipe.run_offload_hook

        def other(module: Any) -> None:
            pipe._guidance_scale = 1.0
            run(module)

        pipe.run_offload_hook = other
        assert torch.equal(pipe(callback_on_step_end=look, **options).images, plain)
        assert seen == [4.0, 4.0]

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (torch.zeros(1), "the callback returned Tensor, expected nothing, or a dictionary"),
            ([1], "the callback returned list, expected nothing, or a dictionary"),
            (
                {"latents": np.zeros((1, 8, 4, 4))},
                "the callback returned latents that are a ndarray, expected a tensor",
            ),
            ({"latents": torch.zeros(1, 8, 4, 5)}, r"latents of the shape \(1, 8, 4, 5\), expected \(1, 8, 4, 4\)"),
        ],
    )
    def test_what_it_may_return(self, returned: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_pipeline("none")(callback_on_step_end=lambda *_: returned)

    @pytest.mark.parametrize("scale", ["4", float("nan"), True])
    def test_a_scale_is_a_number(self, scale: Any) -> None:
        def change(pipe: Any, *_: Any) -> dict[str, Any]:
            pipe._guidance_scale = scale
            return {}

        with pytest.raises(ValueError, match=r"the callback set _guidance_scale to .*, expected a number"):
            make_pipeline()(class_labels=1, callback_on_step_end=change)


class TestWithoutEffect:
    @pytest.mark.parametrize(
        ("conditioning", "options", "message"),
        [
            ("prefix", {"negative_prompt_embeds": torch.zeros(1, 8, 16)}, "negative_prompt_embeds has no effect"),
            ("prefix", {"guidance_annealed": True, "guidance_method": "linear"}, "guidance_annealed has no effect"),
            ("prefix", {"attention_temperature": 0.5}, "attention_temperature has no effect without guidance"),
            ("prefix", {"guidance_blocks": "deep"}, "guidance_blocks has no effect without guidance"),
            ("none", {"guidance_scale": 5.0}, "draws without conditions, so there is nothing to lead away from"),
        ],
    )
    def test_guidance_that_is_off(self, conditioning: str, options: dict[str, Any], message: str) -> None:
        given = {"prompt": CAPTIONS} if conditioning == "prefix" else {}
        with pytest.raises(ValueError, match=message):
            make_pipeline(conditioning)(**{"guidance_scale": 1.0, **given, **options})

    def test_a_scale_that_a_pipeline_has_is_no_wish(self) -> None:
        pipe = make_pipeline("none")
        pipe.register_to_config(guidance_scale=3.0)
        assert len(pipe(guidance_scale=3.0).images) == len(pipe().images) == 1
        with pytest.raises(ValueError, match="draws without conditions"):
            pipe(guidance_scale=2.0)

    def test_lengths_of_encoded_captions(self) -> None:
        with pytest.raises(ValueError, match="max_sequence_length has no effect on prompt_embeds"):
            make_pipeline("prefix")(prompt_embeds=torch.zeros(1, 8, 16), max_sequence_length=4)

    def test_an_empty_negative_caption_is_none_for_students_too(self) -> None:
        pipe = with_student(make_pipeline("prefix"))
        options = {"decoding": "student", "guidance_scale": 2.0, "latents": torch.randn(2, 8, 4, 4)}
        plain = draw(pipe, CAPTIONS, **options)
        for empty in ("", ["", ""]):
            assert np.array_equal(draw(pipe, CAPTIONS, negative_prompt=empty, **options), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, r"prompt must be a text or a list of texts, got \[\]"),
        ({"num_images_per_prompt": -1}, "num_images_per_prompt must be a whole number of at least 1, got -1"),
        ({"max_sequence_length": 0}, "max_sequence_length must be at least 1, got 0"),
        ({"aspect_ratio": "foo"}, "aspect_ratio must be one of 21:9, .*, got 'foo'"),
    ],
)
def test_captions_are_encoded_with_the_same_checks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pipeline("prefix").encode_prompt(**{"prompt": CAPTIONS, **options})


def test_a_students_patches_must_fit_the_size() -> None:
    pipe = make_pipeline("none", sample_size=4)
    pipe.register_modules(student=small_student(pipe.flow, patch_size=2))
    assert pipe(decoding="student", height=48).images[0].size == (32, 48)
    with pytest.raises(ValueError, match="the latents are 5 × 4, but this student's patches are 2 × 2"):
        pipe(decoding="student", height=40)
    with pytest.raises(ValueError, match=r"z must have the shape \(B, 8, H, W\), H and W multiples of 2"):
        pipe.student(torch.zeros(1, 8, 5, 4))


class TestTools:
    def test_they_take_encoded_captions(self) -> None:
        pipe = make_pipeline("prefix")
        embeds = pipe.encode_prompt(CAPTIONS[0], do_classifier_free_guidance=False)[0]
        image, mask = torch.rand(1, 3, 32, 32), torch.zeros(32, 32, dtype=torch.bool)
        mask[8:16, 8:24] = True

        def options(**given: Any) -> dict[str, Any]:
            return {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **given}

        text, encoded = {"prompt": CAPTIONS[0]}, {"prompt_embeds": embeds}
        sides = ("source", "target")
        pairs = {
            "vary": [pipe.vary(image, 0.5, **options(**one)).images for one in (text, encoded)],
            "interpolate": [pipe.interpolate(image, image / 2, 2, **options(**one)).images for one in (text, encoded)],
            "inpaint": [pipe.inpaint(image, mask, **options(**one)).images for one in (text, encoded)],
            "best_of": [pipe.best_of(2, **options(**one)).images for one in (text, encoded)],
            "swap": [
                pipe.swap(image, **options(**{f"{side}_{name}": value for side in sides})).images
                for (name, value) in (("prompt", CAPTIONS[0]), ("prompt_embeds", embeds))
            ],
        }
        for first, second in pairs.values():
            torch.testing.assert_close(first, second, rtol=0, atol=1e-4)

    def test_what_cannot_be_is_said_before_any_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = make_pipeline("none")
        monkeypatch.setattr(type(pipe.vae), "encode", lambda *_: pytest.fail("it was encoded first"))
        image, mask = torch.rand(1, 3, 32, 32), torch.zeros(32, 32, dtype=torch.bool)
        mask[:8] = True
        kind = "output_type must be 'pil', 'np', 'pt' or 'latent', got 'PIL'"
        for call, message in (
            (lambda: pipe.inpaint(image, mask, output_type="PIL"), kind),
            (lambda: pipe.vary(image, 0.5, output_type="PIL"), kind),
            (lambda: pipe.interpolate(image, image, output_type="PIL"), kind),
            (lambda: pipe.swap(image, output_type="PIL"), kind),
            (lambda: pipe.best_of(2, output_type="PIL"), kind),
            (lambda: pipe.vary(image, 1.5), "the strength must be from 0 to 1"),
            (lambda: pipe.interpolate(image, image, path="x"), "the path must be one of"),
            (lambda: pipe.interpolate(image, image, steps=1), "has at least 2 steps"),
            (lambda: pipe.inpaint(image, mask, step_size=0.0), "step_size must be above 0"),
            (lambda: pipe.swap(image, guidance_scale=0.5), r"guidance_scale must be at least 1 \(off\), got 0.5"),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    def test_the_best_of_one_caption(self) -> None:
        for options in ({"class_labels": [1, 2]}, {"class_labels": (1, 2)}):
            with pytest.raises(ValueError, match="best_of draws from one caption or class, and class_labels has 2"):
                make_pipeline().best_of(2, **options)

    def test_autocast_does_not_make_them_less_exact(self) -> None:
        pipe, image = make_pipeline(), torch.rand(2, 3, 32, 32)
        options = {"class_labels": [1, 2], "generator": torch.Generator().manual_seed(0)}
        with torch.autocast("cpu", torch.bfloat16):
            assert float(pipe.encode(image, **options).error.max()) < 1e-4
            drawn = pipe(class_labels=[1, 2], return_residual=True, **LATENT)
            x = torch.randn(2, 8, 4, 4)
            moved = pipe.remove_noise(x, "score", torch.tensor([1, 2]))
        assert drawn.residual_max is not None
        assert float(drawn.residual_max.max()) < 1e-4
        torch.testing.assert_close(moved, pipe.remove_noise(x, "score", torch.tensor([1, 2])), rtol=0, atol=1e-6)


class TestAdapters:
    def test_each_part_gets_its_own(self) -> None:
        pipe = pipeline("prefix")
        given = {**arguments(pipe), "latents": torch.randn(2, 8, 4, 4)}
        plain = pipe(**given).images
        add(pipe.flow, "a")
        add(pipe.text_encoder, "b", target_modules=["q"])
        both = pipe.set_adapters(["a", "b"], [0.7, 0.3]) or pipe(**given).images
        text = pipe.set_adapters("b", 0.3) or pipe(**given).images
        flow = pipe.set_adapters("a", 0.7) or pipe(**given).images
        assert pipe.get_list_adapters() == {"flow": ["a"], "text_encoder": ["b"]}
        found = [plain, both, text, flow]
        assert all(not torch.equal(one, other) for i, one in enumerate(found) for other in found[:i])
        pipe.set_adapters(["b", "a"], [{"text_encoder": 0.3}, {"flow": 0.7}])
        torch.testing.assert_close(pipe(**given).images, both)
        with pytest.raises(ValueError, match="the pipeline has no adapter 'c'; it has: a, b"):
            pipe.set_adapters(["a", "c"])
        with pytest.raises(ValueError, match="weights of adapters are for flow and text_encoder, got 'flwo'"):
            pipe.set_adapters(["a"], [{"flwo": 0.5}])
        with pytest.raises(ValueError, match="got 2 adapters and 1 weights"):
            pipe.set_adapters(["a", "b"], [1.0])

    def test_they_come_from_somewhere(self) -> None:
        with pytest.raises(
            ValueError, match="adapters are read from a folder, a file, a hub id, or weights by name, got None"
        ):
            pipeline().load_lora_weights(None)


def test_settings_without_a_flow() -> None:
    """As Diffusers makes a pipeline whose parts come later."""
    found = checked_settings(
        latents_mean=None,
        latents_std=None,
        noise_std=0,
        id2label={"3": "a"},
        max_sequence_length=1,
        guidance_scale=1,
        guidance_method="linear",
        caption_template="{prompt}",
        decoder="finetuned",
        denoise=1,
    )
    assert found["id2label"] == {"3": "a"} and found["denoise"] is True


def test_captions_of_data_are_cut_without_a_warning_each_time(caplog: pytest.LogCaptureFixture) -> None:
    pipe, long = make_pipeline("prefix"), ["a red ring " * 20]
    quiet = condition_of(pipe, {"caption": long}, 1, with_condition=True)["cond"]
    assert not caplog.text
    torch.testing.assert_close(quiet, pipe.encode_prompt(long, do_classifier_free_guidance=False)[0])
    assert "captions are longer than 8 tokens" in caplog.text

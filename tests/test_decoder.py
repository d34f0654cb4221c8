"""Decoders that remove the training noise themselves: the module, the pipeline's modes, the training, the comparison."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from test_pipeline import draw, make_pipeline

from tarflow import TARFlowPipeline
from tarflow.vae.codec import weights_hash
from tarflow.vae.decoder import LatentDecoder


def small_autoencoder(**changes) -> AutoencoderKL:
    arguments = {
        "latent_channels": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    }
    return AutoencoderKL(**{**arguments, **changes}).eval().requires_grad_(False)


def with_decoder(pipe: TARFlowPipeline, default: str = "finetuned") -> TARFlowPipeline:
    """The pipeline with a finetuned decoder that differs from the autoencoder's."""
    decoder = LatentDecoder.from_autoencoder(pipe.vae)
    with torch.no_grad():
        decoder.last_layer.mul_(1.5)
    pipe.register_modules(finetuned_decoder=decoder)
    pipe.register_to_config(decoder=default)
    return pipe


@pytest.mark.parametrize("options", [{}, {"use_post_quant_conv": False, "mid_block_add_attention": False}])
@torch.no_grad()
def test_it_gives_the_autoencoders_numbers(options, tmp_path) -> None:
    vae, raw = small_autoencoder(**options), torch.randn(2, 8, 3, 4)
    decoder = LatentDecoder.from_autoencoder(vae)
    assert torch.equal(decoder.decode(raw), vae.decode(raw).sample)
    decoder.save_pretrained(tmp_path)
    assert torch.equal(LatentDecoder.from_pretrained(tmp_path).decode(raw), vae.decode(raw).sample)
    decoder.last_layer.zero_()
    assert vae.decoder.conv_out.weight.any()  # a copy


def test_other_autoencoders_are_refused() -> None:
    with pytest.raises(ValueError, match="out of an AutoencoderKL only, but this autoencoder is AutoencoderTiny"):
        LatentDecoder.from_autoencoder(AutoencoderTiny())


@torch.no_grad()
def test_decoders_of_a_pipeline() -> None:
    pipe = with_decoder(make_pipeline("none"), default="vae")
    raw, latents = (draw(pipe, num_images=2, denoise=flag, output_type="latent") for flag in (False, True))
    decoded = {
        "raw": pipe.codec.decode(raw),
        "score": pipe.codec.decode(latents),
        "finetuned": pipe.codec.decode(raw, pipe.finetuned_decoder),
    }
    decoded = {name: (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() for name, images in decoded.items()}
    for default, by_default in (("vae", "score"), ("finetuned", "finetuned")):
        pipe.register_to_config(decoder=default)
        unnamed_raw = "raw" if default == "vae" else "finetuned"
        for options, wanted in (
            ({}, by_default),
            ({"denoise": True}, "score"),
            ({"denoise": "score", "decoder": "vae"}, "score"),
            ({"denoise": False, "decoder": "vae"}, "raw"),
            ({"denoise": False}, unnamed_raw),
            ({"decoder": "vae"}, "score"),
            ({"decoder": "finetuned"}, "finetuned"),
        ):
            np.testing.assert_allclose(draw(pipe, num_images=2, **options), decoded[wanted], atol=1e-5)
    assert torch.equal(draw(pipe, num_images=2, output_type="latent", decoder="finetuned"), raw)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_keeps_its_decoder(tmp_path, variant) -> None:
    pipe = with_decoder(make_pipeline("none"))
    dtype = torch.float16 if variant else torch.float32
    pipe.to(dtype).save_pretrained(tmp_path / "pipeline", variant=variant)
    loaded = TARFlowPipeline.from_pretrained(tmp_path / "pipeline", variant=variant, torch_dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.decoder == "finetuned"
    assert loaded.finetuned_decoder.dtype == dtype
    assert weights_hash(loaded.finetuned_decoder) == weights_hash(pipe.finetuned_decoder)
    if variant is None:
        images = draw(pipe, num_images=2)
        assert np.array_equal(images, draw(loaded, num_images=2))
        loaded.enable_model_cpu_offload(device="cpu")
        assert np.array_equal(images, draw(loaded, num_images=2))


def test_folders_without_the_component_load(tmp_path) -> None:
    pipe = make_pipeline("none")
    pipe.save_pretrained(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    content = json.loads(index.read_text())
    for name in ("finetuned_decoder", "decoder"):  # as folders of earlier versions
        del content[name]
    index.write_text(json.dumps(content))
    loaded = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.finetuned_decoder is None
    assert loaded.config.decoder == "vae"
    assert np.array_equal(draw(pipe, num_images=2), draw(loaded, num_images=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "finetuned"}, "no finetuned decoder: make one with scripts/finetune_decoder.py"),
        (
            {"decoder": "finetuned", "denoise": True},
            "decoder='finetuned' takes noisy latents .* leave denoise=True out",
        ),
        ({"decoder": "finetuned", "denoise": "learned"}, "leave denoise='learned' out"),
        ({"decoder": "other"}, "decoder must be None, 'vae' or 'finetuned', got 'other'"),
        ({"denoise": "other"}, "denoise must be None, True, False, 'score' or 'learned', got 'other'"),
    ],
)
def test_modes_that_do_not_fit(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_pipeline("none")(**options)


def test_models_of_pixels_have_no_decoder() -> None:
    with pytest.raises(ValueError, match="draws pixels: there is no decoder, finetuned or not"):
        make_pipeline("none", vae=False)(decoder="finetuned")

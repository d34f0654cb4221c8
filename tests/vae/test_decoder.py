"""Decoders that remove the training noise themselves: the module, the pipeline's modes, the training, the comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from autoencoders import small_autoencoder
from decoders import finetune, tiny_pipeline, with_decoder
from diffusers import AutoencoderTiny
from helpers import ROOT, files_of, fresh_process
from PIL import Image
from pipelines import draw as draw_images
from pipelines import make_pipeline

from tarflow import TARFlowPipeline, models
from tarflow.common.arguments import parse_dataclass
from tarflow.data.images import collate, to_model
from tarflow.pipeline.loading.folder import add_component
from tarflow.training.autoencoder.decoder import DecoderTask
from tarflow.training.autoencoder.decoder_config import DecoderConfig
from tarflow.vae.codec import weights_hash
from tarflow.vae.decoder import LatentDecoder, decoder_of


def draw(pipe, **options):
    """Two images by the decoding that does not depend on timing."""
    return draw_images(pipe, num_images=2, decoding="sequential", **options)


@pytest.mark.parametrize("options", [{}, {"use_post_quant_conv": False, "mid_block_add_attention": False}])
@torch.no_grad()
def test_it_gives_the_autoencoders_numbers(options, tmp_path) -> None:
    vae, raw = small_autoencoder(**options), torch.randn(2, 8, 3, 4)
    decoder = LatentDecoder.from_autoencoder(vae)
    torch.testing.assert_close(decoder.decode(raw), vae.decode(raw).sample, rtol=0, atol=1e-5)
    decoder.save_pretrained(tmp_path)
    loaded = LatentDecoder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.decode(raw), vae.decode(raw).sample, rtol=0, atol=1e-5)
    decoder.last_layer.zero_()
    assert vae.decoder.conv_out.weight.any()  # a copy


def test_other_autoencoders_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"out of an AutoencoderKL or an AutoencoderTAEF2 only, but .* is AutoencoderTiny"
    ):
        decoder_of(AutoencoderTiny())
    with pytest.raises(ValueError, match="this decoder is of an AutoencoderKL, but the autoencoder is AutoencoderTiny"):
        LatentDecoder.from_autoencoder(AutoencoderTiny())


@torch.no_grad()
def test_decoders_of_a_pipeline() -> None:
    pipe = with_decoder(make_pipeline("none"), default="vae")
    raw, latents = (draw(pipe, denoise=flag, output_type="latent") for flag in (False, True))
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
            np.testing.assert_allclose(draw(pipe, **options), decoded[wanted], atol=1e-5)
    assert torch.equal(draw(pipe, output_type="latent", decoder="finetuned"), raw)


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
        images = draw(pipe)
        np.testing.assert_allclose(draw(loaded), images, rtol=0, atol=1e-5)
        loaded.enable_model_cpu_offload(device="cpu")
        np.testing.assert_allclose(draw(loaded), images, rtol=0, atol=1e-5)


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
    np.testing.assert_allclose(draw(loaded), draw(pipe), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "finetuned"}, "no finetuned decoder: make one with tarflow finetune-decoder"),
        (
            {"decoder": "finetuned", "denoise": True},
            "decoder='finetuned' takes noisy latents .* leave denoise=True out",
        ),
        ({"decoder": "finetuned", "denoise": "learned"}, "leave denoise='learned' out"),
        ({"decoder": "other"}, "decoder must be None, 'vae' or 'finetuned', got 'other'"),
        ({"denoise": "other"}, "denoise must be None, True, False, 'none', 'score' or 'learned', got 'other'"),
    ],
)
def test_modes_that_do_not_fit(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_pipeline("none")(**options)


def test_models_of_pixels_have_no_decoder() -> None:
    with pytest.raises(ValueError, match="draws pixels: there is no decoder, finetuned or not"):
        make_pipeline("none", vae=False)(decoder="finetuned")


@pytest.mark.parametrize("sampled", [True, False])
def test_noise_is_on_draws_or_means_of_the_posterior(tmp_path, sampled) -> None:
    tiny_pipeline(tmp_path / "pipeline")
    settings = ["--pipeline", str(tmp_path / "pipeline"), "--data.image_size", "16", "--noise_std", "0"]
    settings += ["--mixed_precision", "no", "--sample_posterior", str(sampled).lower()]
    config, _ = parse_dataclass(DecoderConfig, settings)
    fresh_process()
    task = DecoderTask(config, Accelerator(cpu=True))
    task.make_parts(None)
    batch = collate([task.train[i] for i in range(4)])
    seen = []
    task.decode(lambda raw: seen.append(raw), batch, 0, range(4))
    mean = task.pipe.vae.encode(to_model(batch["image"])).latent_dist.mean
    assert torch.allclose(seen[0], mean, atol=1e-5) != sampled


@pytest.mark.parametrize("start", ["vae", "finetuned"])
def test_training_starts_from_either_decoder(tmp_path, start) -> None:
    pipe = tiny_pipeline(tmp_path / "pipeline")
    settings = ["--pipeline", str(tmp_path / "pipeline"), "--data.image_size", "16", "--start", start]
    settings += ["--output", str(tmp_path / "run")]
    fresh_process()
    task = DecoderTask(parse_dataclass(DecoderConfig, settings)[0], Accelerator(cpu=True))
    if start == "finetuned":
        with pytest.raises(ValueError, match=r"begins from the finetuned decoder of .*, which has none: leave --start"):
            task.make_parts(None)
    with_decoder(pipe).save_pretrained(tmp_path / "pipeline")
    task.make_parts(None)
    wanted = pipe.finetuned_decoder if start == "finetuned" else LatentDecoder.from_autoencoder(pipe.vae)
    assert weights_hash(task.network) == weights_hash(wanted)
    assert all(weight.requires_grad for weight in task.network.parameters())


def test_the_shipped_configuration_is_valid() -> None:
    config, _ = parse_dataclass(DecoderConfig, ["--config", str(ROOT / "configs" / "decoder.yaml")])
    assert config.folder == Path("runs/emoji_text_decoder")


def test_training_improves_the_decoder_alone(tmp_path) -> None:
    folder = tmp_path / "pipeline"
    tiny_pipeline(folder)
    before = files_of(folder)
    first = finetune(folder, tmp_path / "a", "--steps", "1")
    metrics = finetune(folder, tmp_path / "b", "--steps", "40", "--eval_every", "20")
    assert metrics["psnr_none"] == first["psnr_none"]
    assert metrics["psnr_finetuned"] > max(metrics["psnr_none"], first["psnr_finetuned"]) + 2
    assert metrics["ssim_finetuned"] > metrics["ssim_none"]
    assert Image.open(tmp_path / "b" / "samples" / "decoded_00000040.png").size == (8 * 18 + 2, 4 * 18 + 2)
    after = files_of(folder)
    assert {name: after[name] for name in before if name != "model_index.json"} == {
        name: content for name, content in before.items() if name != "model_index.json"
    }
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline", "a", "b"}
    pipe = TARFlowPipeline.from_pretrained(folder)
    assert pipe.config.decoder == "finetuned"
    assert weights_hash(pipe.finetuned_decoder) != weights_hash(LatentDecoder.from_autoencoder(pipe.vae))


def test_resuming_is_bit_identical(tmp_path) -> None:
    tiny_pipeline(tmp_path / "whole")
    tiny_pipeline(tmp_path / "parts")
    options = ["--checkpoint_every", "3", "--data.flip", "true", "--loss.adversarial", "0.1"]
    options += ["--loss.discriminator_width", "8", "--loss.discriminator_layers", "1", "--loss.adversarial_start", "2"]
    finetune(tmp_path / "whole", tmp_path / "a", *options)
    finetune(tmp_path / "parts", tmp_path / "b", *options)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_00000006")
    tiny_pipeline(tmp_path / "parts")
    with pytest.raises(ValueError, match="has checkpoints of an earlier run, up to step_00000003"):
        finetune(tmp_path / "parts", tmp_path / "b", *options)
    finetune(tmp_path / "parts", tmp_path / "b", *options, "--resume", "latest")
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"noise_std is 0\.5 there and 0\.1 here"):
        finetune(tmp_path / "parts", tmp_path / "b", *options, "--resume", "latest", "--noise_std", "0.1")


def test_where_the_decoder_goes(tmp_path, monkeypatch) -> None:
    tiny_pipeline(tmp_path / "pipeline")
    before = files_of(tmp_path / "pipeline")
    finetune(tmp_path / "pipeline", tmp_path / "a", "--save_to", str(tmp_path / "new"), "--dtype", "float16")
    assert files_of(tmp_path / "pipeline") == before
    assert files_of(tmp_path / "new")["README.md"] == b"a card"
    finetune(tmp_path / "pipeline", tmp_path / "b", "--set_default", "false")
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.config.decoder == "vae"
    assert pipe.finetuned_decoder is not None
    (tmp_path / "other" / "vae").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"other', where to save, is there and no pipeline folder"):
        finetune(tmp_path / "pipeline", tmp_path / "c", "--save_to", str(tmp_path / "other"))
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"'new' is no pipeline folder that could be changed.*--save_to FOLDER"):
        finetune("new", tmp_path / "c")
    with pytest.raises(ValueError, match=r"has pictures of 16 pixels, but data\.image_size is 32"):
        finetune(tmp_path / "pipeline", tmp_path / "c", "--data.image_size", "32")
    assert not (tmp_path / "c").exists()


def test_a_full_disk_leaves_the_pipeline_as_it_was(tmp_path, monkeypatch) -> None:
    pipe = tiny_pipeline(tmp_path / "pipeline")
    before = files_of(tmp_path / "pipeline")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LatentDecoder, "save_pretrained", full)
    folder = tmp_path / "pipeline"
    with pytest.raises(OSError, match="No space left"):
        add_component(
            folder, folder, "finetuned_decoder", LatentDecoder.from_autoencoder(pipe.vae), decoder="finetuned"
        )
    assert files_of(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]

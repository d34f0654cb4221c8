"""Images to normalised latents and back, with any autoencoder."""

from __future__ import annotations

import importlib.util
import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from helpers import SHARED
from PIL import Image
from torch import Tensor

from tarflow.models import AUTOENCODERS as SHIPPED
from tarflow.vae.codec import LatentCodec, load_autoencoder, measure_latents

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}


def autoencoder_kl(**changes: Any) -> AutoencoderKL:
    arguments = {
        **BLOCKS,
        "block_out_channels": (8, 8, 16),
        "norm_num_groups": 4,
        "latent_channels": 3,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**arguments, **changes}).eval().requires_grad_(False)


def autoencoder_tiny(**changes: Any) -> AutoencoderTiny:
    channels = (8, 8, 8)
    arguments = {"encoder_block_out_channels": channels, "decoder_block_out_channels": channels, "latent_channels": 3}
    arguments |= {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    return AutoencoderTiny(**{**arguments, **changes}).eval().requires_grad_(False)


def autoencoder_dc() -> AutoencoderDC:
    channels = (12, 12, 12)
    sides = {f"{side}_block_out_channels": channels for side in ("encoder", "decoder")}
    sides |= {f"{side}_layers_per_block": (1, 1, 1) for side in ("encoder", "decoder")}
    sides |= {f"{side}_block_types": "ResBlock" for side in ("encoder", "decoder")}
    sides |= {f"{side}_qkv_multiscales": ((), (), ()) for side in ("encoder", "decoder")}
    return AutoencoderDC(latent_channels=3, attention_head_dim=4, **sides).eval().requires_grad_(False)


class Halving:
    """An autoencoder of no library: means of 2 × 2 pixels."""

    spatial_compression_ratio = 2

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 2)

    def decode(self, latents: Tensor) -> tuple[Tensor]:
        return (latents.repeat_interleave(2, -1).repeat_interleave(2, -2),)


AUTOENCODERS = {
    "kl": (autoencoder_kl, 4),
    "kl_two": (lambda: autoencoder_kl(block_out_channels=(8, 8), **{k: v[:2] for k, v in BLOCKS.items()}), 2),
    "tiny": (autoencoder_tiny, 4),
    "dc": (autoencoder_dc, 4),
    "any": (Halving, 2),
    "none": (lambda: None, 1),
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_shapes_and_factor(name: str) -> None:
    make, factor = AUTOENCODERS[name]
    codec = LatentCodec(make())
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = codec.encode(images)
    assert codec.factor == factor
    assert latents.shape == (2, 3, 16 // factor, 24 // factor)
    assert codec.decode(latents).shape == images.shape


@pytest.mark.parametrize("name", [name for name in AUTOENCODERS if name != "none"])
def test_other_sizes_are_errors(name: str) -> None:
    make, factor = AUTOENCODERS[name]
    for shape in ((1, 3, 16, 17), (1, 3, 17, 16)):
        with pytest.raises(ValueError, match=f"must be multiples of {factor}, got {shape[2]} × {shape[3]}"):
            LatentCodec(make()).encode(torch.zeros(shape))


def test_without_an_autoencoder_latents_are_pixels() -> None:
    images = torch.rand(2, 3, 5, 7) * 2 - 1
    assert torch.equal(LatentCodec(None).encode(images), images)
    codec = LatentCodec(None, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    latents = codec.encode(images)
    torch.testing.assert_close(latents[:, 1], (images[:, 1] - 0.2) / 0.6)
    torch.testing.assert_close(codec.decode(latents), images)
    assert load_autoencoder(None) is None


def test_the_autoencoders_own_factors_are_used() -> None:
    vae = autoencoder_kl(scaling_factor=0.5, shift_factor=0.25)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    codec = LatentCodec(vae, [0.1, 0.2, 0.3], [2.0, 3.0, 4.0])
    raw = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(codec.encode_raw(images), raw)
    torch.testing.assert_close(codec.scale_raw(raw), (raw - 0.25) * 0.5)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([2.0, 3.0, 4.0]).view(3, 1, 1)
    latents = codec.encode(images)
    torch.testing.assert_close(latents, ((raw - 0.25) * 0.5 - mean) / std)
    torch.testing.assert_close(codec.decode(latents), vae.decode(raw).sample, rtol=1e-4, atol=1e-5)


def test_the_tiny_autoencoders_shift_is_not_for_latents() -> None:
    vae = autoencoder_tiny(shift_factor=0.5)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(LatentCodec(vae).encode(images), vae.encode(images).latents)


def test_sample_and_mode() -> None:
    vae = autoencoder_kl()
    codec, images = LatentCodec(vae), torch.rand(1, 3, 16, 16) * 2 - 1
    mode = codec.encode(images)
    assert torch.equal(codec.encode(images), mode)
    first = codec.encode(images, sample=True, generator=torch.Generator().manual_seed(1))
    again = codec.encode(images, sample=True, generator=torch.Generator().manual_seed(1))
    other = codec.encode(images, sample=True, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
    std = vae.encode(images).latent_dist.std * vae.config.scaling_factor
    draws = torch.stack([codec.encode(images, sample=True) for _ in range(400)])
    assert (draws.mean(0) - mode).abs().max() < 0.3 * std.max()
    assert (draws.std(0) / std - 1).abs().max() < 0.3


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_measured_statistics_normalise(name: str) -> None:
    vae = AUTOENCODERS[name][0]()
    batches = [{"image": torch.randint(0, 256, (count, 3, 16, 16))} for count in (5, 3, 7)]

    def prepare(batch: dict[str, Tensor]) -> Tensor:
        return batch["image"] / 127.5 - 1

    codec = LatentCodec(vae, *measure_latents(vae, batches, prepare))
    latents = torch.cat([codec.encode(prepare(batch)) for batch in batches]).double()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-4)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images to measure"):
        measure_latents(None, [], lambda batch: batch)


def test_wrong_statistics_are_errors() -> None:
    with pytest.raises(ValueError, match="latents_std must be positive"):
        LatentCodec(None, [0.0, 0.0, 0.0], [1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="statistics of 2 channels for latents of 3"):
        LatentCodec(None, [0.0, 0.0], [1.0, 1.0]).encode(torch.zeros(1, 3, 4, 4))


def test_an_autoencoder_without_a_known_factor_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot tell the factor of SimpleNamespace"):
        LatentCodec(SimpleNamespace(config={})).encode(torch.zeros(1, 3, 4, 4))


def test_half_precision_autoencoders_give_float32_latents() -> None:
    codec = LatentCodec(autoencoder_kl().to(torch.bfloat16), [0.0] * 3, [1.0] * 3)
    latents = codec.encode(torch.rand(1, 3, 16, 16) * 2 - 1)
    assert latents.dtype == torch.float32
    assert codec.decode(latents).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("make", [autoencoder_kl, autoencoder_tiny, autoencoder_dc])
def test_saved_autoencoders_load_frozen(make: Any, tmp_path: Path) -> None:
    vae = make()
    vae.save_pretrained(tmp_path / "vae")
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    for loaded in (load_autoencoder(str(tmp_path / "vae")), load_autoencoder(str(tmp_path), subfolder="vae")):
        assert type(loaded) is type(vae)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        expected = LatentCodec(vae).encode(images)
        torch.testing.assert_close(LatentCodec(loaded).encode(images), expected, rtol=0, atol=1e-5)


def test_unknown_autoencoders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load the autoencoder .*shipped: drawings_emoji_f8c8"):
        load_autoencoder(str(tmp_path / "nowhere"))
    for name, own in (("drawings_class", "drawings_emoji_f8c8"), ("emoji", "taef2")):  # and the Hub is not asked
        with pytest.raises(ValueError, match=f"this is a shipped pipeline, whose autoencoder is {own}"):
            load_autoencoder(name)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NoSuchAutoencoder"}))
    with pytest.raises(ValueError, match="cannot load the autoencoder"):
        load_autoencoder(str(tmp_path))


def test_the_shipped_autoencoders() -> None:
    channels = {"drawings_emoji_f8c8": 8, "taef2": 32}
    assert set(channels) == set(SHIPPED)
    for name, count in channels.items():
        codec = LatentCodec(load_autoencoder(name))
        latents = codec.encode(torch.zeros(1, 3, 64, 64))
        assert (codec.factor, latents.shape) == (8, (1, count, 8, 8))


def test_an_autoencoder_made_elsewhere_keeps_photographs() -> None:
    """TAEF2 has layers that its library class lacks; the codec takes the object as it is."""
    archive, loader = SHARED / "data" / "imagenette" / "imagenette-128.zip", SHARED / "data" / "load.py"
    if not (archive.exists() and loader.exists()):
        pytest.skip("the photographs and the TAEF2 weights are not here")
    spec = importlib.util.spec_from_file_location("load_taef2", loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    codec = LatentCodec(module.taef2_as_diffusers())
    with zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if name.startswith("val/"))[::500]
        pictures = [Image.open(io.BytesIO(opened.read(name))).convert("RGB") for name in names]
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2).float()
    latents = codec.encode(pixels / 127.5 - 1)
    assert latents.shape == (len(names), 32, 16, 16)
    decoded = ((codec.decode(latents).clamp(-1, 1) + 1) * 127.5).round()
    psnr = 10 * torch.log10(255**2 / (decoded - pixels).pow(2).mean((1, 2, 3)))
    assert psnr.mean() > 24

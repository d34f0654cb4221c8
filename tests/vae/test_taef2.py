"""TAEF2: Diffusers' tiny autoencoder with other middle blocks; its own files, folders, pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import SHARED
from safetensors.torch import save_file

from tarflow import LatentCodec, TARFlowPipeline
from tarflow.flows.model import TARFlowModel
from tarflow.vae.codec import autoencoder_hash, load_autoencoder
from tarflow.vae.decoder import TAEF2Decoder, decoder_of
from tarflow.vae.taef2 import ORIGINAL, AutoencoderTAEF2, PooledBlock

WEIGHTS = SHARED / "data" / "weights" / "taef2"
SMALL = {"latent_channels": 3, "block_out_channels": (8, 8), "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}


def small() -> AutoencoderTAEF2:
    torch.manual_seed(0)
    return AutoencoderTAEF2(**SMALL).eval().requires_grad_(False)


def test_the_blocks_of_the_lowest_resolution_see_the_whole_picture() -> None:
    vae = small()
    assert [type(layer) is PooledBlock for layer in vae.encoder.layers] == [False] * 3 + [True] * 2 + [False]
    assert [type(layer) is PooledBlock for layer in vae.decoder.layers][:5] == [False, False, True, True, False]
    latents = vae.encode(torch.zeros(1, 3, 64, 64)).latents
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., :8, :8] = 1
    change = (vae.encode(picture).latents - latents).abs().amax(1)
    assert float(change[..., -1, -1].max()) > 0  # too far for convolutions


def test_a_saved_one_comes_back(tmp_path: Path) -> None:
    vae = small()
    vae.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert type(loaded) is AutoencoderTAEF2
    assert loaded.config["block_out_channels"] == [8, 8]
    assert autoencoder_hash(loaded) == autoencoder_hash(vae)


def test_a_pipeline_keeps_it(tmp_path: Path) -> None:
    vae = small()
    flow = TARFlowModel(in_channels=3, sample_size=4, patch_size=1, layers_per_block=[1, 1], width=16, head_dim=8)
    pipe = TARFlowPipeline(flow=flow.eval(), vae=vae)
    pipe.save_pretrained(tmp_path)
    loaded = TARFlowPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is AutoencoderTAEF2
    drawn = [p(generator=torch.Generator().manual_seed(0), output_type="pt").images for p in (pipe, loaded)]
    assert drawn[0].shape == (1, 3, 8, 8)
    torch.testing.assert_close(*drawn, atol=1e-5, rtol=0)


@torch.no_grad()
def test_its_decoder_gives_its_numbers(tmp_path: Path) -> None:
    vae, raw = small(), torch.randn(2, 3, 4, 5)
    decoder = decoder_of(vae)
    torch.testing.assert_close(decoder.decode(raw), vae.decode(raw).sample, rtol=0, atol=1e-5)
    decoder.save_pretrained(tmp_path)
    loaded = TAEF2Decoder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.decode(raw), vae.decode(raw).sample, rtol=0, atol=1e-5)
    decoder.last_layer.zero_()
    assert vae.decoder.layers[-1].weight.any()  # a copy


def write_original(vae: AutoencoderTAEF2, folder: Path) -> None:
    """As the author's files have it: a number and the rest of the name; the decoder begins with a clamp."""
    folder.mkdir(exist_ok=True)
    for part, first in (("encoder", 0), ("decoder", 1)):
        named = {}
        for name, value in getattr(vae, part).layers.state_dict().items():
            index, rest = name.split(".", 1)
            named[f"{int(index) + first}.{rest}"] = value.half().contiguous()
        save_file(named, folder / ORIGINAL[part])


def test_the_authors_files_are_read(tmp_path: Path) -> None:
    vae = AutoencoderTAEF2().half().float().eval()
    write_original(vae, tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert loaded.dtype == torch.float32 and not next(loaded.parameters()).requires_grad
    assert autoencoder_hash(loaded) == autoencoder_hash(vae)
    codec = LatentCodec(loaded)
    assert codec.factor == 8 and codec.factors == (0.0, 1.0)


def test_files_of_another_autoencoder_are_refused(tmp_path: Path) -> None:
    write_original(small(), tmp_path)
    with pytest.raises(
        ValueError, match=r"taef2_encoder.safetensors' is no encoder of TAEF2: .*(size mismatch|Missing)"
    ):
        load_autoencoder(str(tmp_path))
    (tmp_path / ORIGINAL["encoder"]).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no encoder of TAEF2"):
        load_autoencoder(str(tmp_path))


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="needs ../shared/data/weights/taef2")
def test_the_real_one_gives_pictures_back() -> None:
    ramp = torch.linspace(-1, 1, 64)
    pictures = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])[None]
    codec = LatentCodec(load_autoencoder(str(WEIGHTS)))
    with torch.no_grad():
        latents = codec.encode(pictures)
        again = codec.decode(latents)
    assert latents.shape == (1, 32, 8, 8)
    assert float((again - pictures).pow(2).mean().sqrt()) < 0.15

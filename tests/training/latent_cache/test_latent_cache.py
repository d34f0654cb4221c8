"""Caches of latents: what is written is what the autoencoder gives, whole or not at all, and read back by name."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch.utils.data import DataLoader
from trainings import TEXT_FLOW, train
from transformers import T5EncoderModel

from tarflow.common.arguments import parse_dataclass
from tarflow.common.folders import open_folder
from tarflow.data.config import DataConfig
from tarflow.data.images import Images, collate, open_source, to_model
from tarflow.data.latents import CachedLatents
from tarflow.pipeline.call.aspect import ASPECT_RATIOS, aspect_size, bucket_size
from tarflow.pipeline.text.encoding import encode_captions
from tarflow.training.flow.config import TextConfig, VaeConfig
from tarflow.training.flow.text import load_cached_text, small_t5, train_tokenizer
from tarflow.training.latent_cache import folder as cache_folder
from tarflow.training.latent_cache.caching import Encoder, cache_latents, prepare_folder, write_manifest, write_shards
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.training.latent_cache.plan import data_settings, make_plan
from tarflow.training.loop.batches import fixed_batches, read_batch
from tarflow.vae.codec import LatentCodec, autoencoder_hash, load_autoencoder, measure_latents

COUNT = 22


@pytest.fixture(scope="session")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved random autoencoder of factor 4, with a scaling and a shift factor."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return str(path)


def cache_config(output: Path, vae_path: str, **changes: Any) -> CacheConfig:
    """22 drawings in shards of 8, six held-out ones, exact numbers."""
    arguments: dict[str, Any] = {"data": DataConfig(image_size=16), "num_images": COUNT, "num_validation_images": 6}
    arguments |= {"vae": VaeConfig(name=vae_path), "shard_size": 8, "batch_size": 5, "dtype": "float32"}
    return CacheConfig(output=str(output), **{**arguments, **changes})


@pytest.fixture(scope="session")
def cached(tmp_path_factory: pytest.TempPathFactory, vae_path: str) -> Path:
    """A cache with mirrored pictures; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("cache")
    cache_latents(cache_config(folder, vae_path, flip=True))
    return folder


@pytest.fixture
def own(cached: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cached, tmp_path / "own"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}


def test_a_cache_has_what_the_autoencoder_gives(cached: Path, vae_path: str) -> None:
    vae = load_autoencoder(vae_path)
    codec = LatentCodec(vae)
    for split, count in (("train", COUNT), ("validation", 6)):
        latents, images = CachedLatents(cached, split, flip=True), Images(DataConfig(image_size=16), split)
        assert (len(latents), latents.shapes, latents.groups) == (count, [(4, 4)], [range(count)])
        assert (latents.class_names, latents.has_captions) == (images.class_names, True)
        for i in (0, 4, count - 1):
            item, picture = latents[i], images[i]
            assert (item["caption"], item["label"]) == (picture["caption"], picture["label"])
            assert latents.caption(i) == images.caption(i) == picture["caption"]
            pixels = to_model(picture["image"][None])
            mean, std = item["latent_mean"], item["latent_std"]
            torch.testing.assert_close(mean[None], codec.encode(pixels))
            torch.testing.assert_close(item["latent_mean_flipped"][None], codec.encode(pixels.flip(-1)))
            assert not torch.equal(item["latent_mean_flipped"], mean)
            noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(i))
            drawn = codec.encode(pixels, sample=True, generator=torch.Generator().manual_seed(i))
            torch.testing.assert_close((mean + std * noise), drawn)
            assert item["latent_std_flipped"].shape == std.shape
        with pytest.raises(IndexError):
            latents[count]
    latents = CachedLatents(cached)
    assert latents[0].keys() == {"latent_mean", "latent_std", "caption", "label", "skipped"}
    images = Images(DataConfig(image_size=16))
    batches = [read_batch(images, indices) for indices in fixed_batches(images, COUNT, 7)]
    mean, std = measure_latents(vae, batches, lambda batch: to_model(batch["image"]))
    assert latents.latents_mean == pytest.approx(mean, rel=1e-5)
    assert latents.latents_std == pytest.approx(std, rel=1e-5)
    saved = load_autoencoder(str(cached / "vae"))
    assert latents.manifest["autoencoder"]["hash"] == autoencoder_hash(saved) == autoencoder_hash(vae)


def test_the_autoencoders_hash_is_of_its_numbers(vae_path: str) -> None:
    vae = load_autoencoder(vae_path)
    expected = autoencoder_hash(vae)
    vae.register_to_config(scaling_factor=0.6)
    assert autoencoder_hash(vae) != expected
    vae.register_to_config(scaling_factor=0.5)
    assert autoencoder_hash(vae) == expected
    next(vae.parameters()).view(-1)[0] += 1e-3
    assert autoencoder_hash(vae) != expected


def test_changing_an_item_does_not_change_the_cache(cached: Path) -> None:
    latents = CachedLatents(cached)
    latents[3]["latent_mean"].zero_()
    assert latents[3]["latent_mean"].abs().max() > 0
    assert torch.equal(pickle.loads(pickle.dumps(latents))[3]["latent_mean"], latents[3]["latent_mean"])


def test_a_loader_reads_in_another_process(cached: Path) -> None:
    latents = CachedLatents(cached, flip=True)
    first = latents[0]
    batch = next(iter(DataLoader(latents, batch_size=20, collate_fn=collate, num_workers=1)))
    assert batch["latent_mean"].shape == batch["latent_std_flipped"].shape == (20, 3, 4, 4)
    assert torch.equal(batch["latent_mean"][0], first["latent_mean"])
    assert (batch["label"].dtype, len(batch["caption"]), batch["skipped"]) == (torch.int64, 20, [])


@pytest.mark.parametrize("harm", ["removed", "cut off", "changed", "foreign"])
def test_only_what_is_wrong_is_written_again(own: Path, vae_path: str, harm: str) -> None:
    before, shard = contents(own), own / "train-00001.safetensors"
    data = before[shard.name]
    shard.unlink()
    if harm == "cut off":
        shard.write_bytes(data[:-10])
    elif harm == "changed":
        shard.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
        latents = CachedLatents(own)  # too costly to see when opening
        latents.verify(process=0, processes=2)
        with pytest.raises(ValueError, match=r"train-00001\.safetensors' is corrupt.*rewrites only what is missing"):
            latents.verify(process=1, processes=2)
    elif harm == "foreign":
        fingerprint = json.loads(before["manifest.json"])["fingerprint"].encode()
        shard.write_bytes(data.replace(fingerprint, b"0" * len(fingerprint)))
    messages = {"removed": "cannot be used", "cut off": r"it has \d+ bytes instead of", "foreign": "another cache"}
    if harm in messages:
        with pytest.raises(ValueError, match=rf"train-00001\.safetensors' .*{messages[harm]}"):
            CachedLatents(own)
        assert len(CachedLatents(own, "validation")) == 6
    earlier = times(own)
    cache_latents(cache_config(own, vae_path, flip=True))
    assert {name for name, time in times(own).items() if time != earlier.get(name)} == {shard.name}
    assert contents(own) == before
    CachedLatents(own).verify()


def test_an_interrupted_run_leaves_whole_shards(
    cached: Path, tmp_path: Path, vae_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, latents = [], Encoder.latents

    def breaking(self: Encoder, images: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(len(images))
        if len(calls) == 7:  # within the second shard, whose pictures come in two batches, mirrored too
            raise KeyboardInterrupt
        return latents(self, images)

    config = cache_config(tmp_path, vae_path, flip=True)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "latents", breaking)
        with pytest.raises(KeyboardInterrupt):
            cache_latents(config)
    assert contents(tmp_path).keys() == {"train-00000.safetensors", "unfinished.json"}
    with pytest.raises(ValueError, match="no latent cache in"):
        CachedLatents(tmp_path)
    (tmp_path / "train-00001.safetensors.tmp").write_bytes(b"of a killed run")
    earlier = times(tmp_path)
    cache_latents(config)
    assert times(tmp_path).items() >= earlier.items()
    assert contents(tmp_path) == contents(cached)


def test_a_full_disk_is_one_sentence(tmp_path: Path, vae_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise cache_folder.SafetensorError("no space left")

    monkeypatch.setattr(cache_folder, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*train-00000\.safetensors': no space left; .* so make room"):
        cache_latents(cache_config(tmp_path, vae_path))
    assert contents(tmp_path).keys() == {"unfinished.json"}


def test_several_processes_write_the_same_files(cached: Path, tmp_path: Path, vae_path: str) -> None:
    config = cache_config(tmp_path, vae_path, flip=True)
    encoder = Encoder(config, torch.device("cpu"))
    vae = encoder.codec.vae
    plan = make_plan(config, encoder.codec.factor, autoencoder_hash(vae), None)
    prepare_folder(open_folder(tmp_path), vae)
    records = write_shards(plan, encoder, open_folder(tmp_path), process=1, processes=2)
    assert contents(tmp_path).keys() == {"train-00001.safetensors", "validation-00000.safetensors"}
    records += write_shards(plan, encoder, open_folder(tmp_path), process=0, processes=2)
    write_manifest(plan, encoder, open_folder(tmp_path), records)
    assert contents(tmp_path) == contents(cached)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig(image_size=16, seed=1)}, "data.seed is 0 there and 1 here"),
        ({"flip": False}, "options.flip is True there and False here"),
        ({"vae": VaeConfig()}, "autoencoder.hash is"),
    ],
)
def test_caches_are_not_mixed(cached: Path, vae_path: str, changes: dict[str, Any], message: str) -> None:
    before = times(cached)
    config = cache_config(cached, vae_path, flip=True)
    with pytest.raises(ValueError, match=f"holds another cache, {message}"):
        cache_latents(CacheConfig(**{**vars(config), **changes}))
    assert times(cached) == before


def test_pictures_of_mixed_sizes_keep_their_ratio(tmp_path: Path, vae_path: str) -> None:
    sizes = {"square": (40, 40), "wide": (64, 36), "tall": (30, 41), "turned": (50, 90), "almost": (41, 40)}
    (tmp_path / "data").mkdir()
    for name, size in sizes.items():
        image, exif = Image.new("RGB", size, "red"), Image.Exif()
        exif[0x0112] = 6 if name == "turned" else 1
        image.save(tmp_path / "data" / f"{name}.jpg", exif=exif)
    rows = [json.dumps({"file_name": f"{name}.jpg", "text": name}) for name in sizes]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(rows))
    data = DataConfig(source="folder", path=str(tmp_path / "data"), image_size=32, validation_fraction=0.0)
    ratios = ["1:1", "4:3", "3:4", "16:9", "9:16"]
    options = {"data": data, "num_images": None, "num_validation_images": None, "aspect_ratios": ratios}
    cache_latents(cache_config(tmp_path / "cache", vae_path, **options, shard_size=1))
    latents = CachedLatents(tmp_path / "cache")
    assert latents.shapes == [(8, 8), (9, 7), (6, 11)]
    assert latents.groups == [range(2), range(2, 3), range(3, 5)]
    assert all(abs(h * w / 8**2 - 1) < 0.1 for h, w in latents.shapes)
    captions = [[latents.caption(i) for i in group] for group in latents.groups]
    assert captions == [["square", "almost"], ["tall"], ["wide", "turned"]]
    for shape, group in zip(latents.shapes, latents.groups, strict=True):
        assert all(latents[i]["latent_mean"].shape[1:] == shape for i in group)
    assert len(CachedLatents(tmp_path / "cache", "validation")) == 0
    for name in ASPECT_RATIOS:
        width, height = map(int, name.split(":"))
        assert bucket_size(width / height, 256, 16) == aspect_size(name, 256, 16)


def test_unreadable_pictures_are_replaced(tmp_path: Path, vae_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(5):
        (tmp_path / "data" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (50 * i, 0, 0)).save(tmp_path / "data" / "a" / f"{i}.png")
    (tmp_path / "data" / "a" / "1.png").write_bytes(b"no picture")
    data = {"source": "folder", "path": str(tmp_path / "data"), "image_size": 16, "validation_fraction": 0.0}
    options = {"num_images": None, "num_validation_images": None, "aspect_ratios": ["1:1", "2:1"]}
    config = cache_config(tmp_path / "cache", vae_path, data=DataConfig(**data), **options)
    with pytest.raises(ValueError, match=r"cannot read the image .*1\.png"):
        cache_latents(config)
    config = CacheConfig(**{**vars(config), "data": DataConfig(**data, on_error="skip")})
    assert cache_latents(config)["skipped"] == 1
    assert "1 unreadable images were skipped, for example: cannot read the image" in capsys.readouterr().out
    latents = CachedLatents(tmp_path / "cache")
    assert (len(latents), latents.class_names, latents.has_captions) == (5, ("a",), False)
    torch.testing.assert_close(latents[1]["latent_mean"], latents[2]["latent_mean"], rtol=0, atol=1e-5)
    assert latents.caption(1) is None


def test_captions_are_encoded(tmp_path: Path, vae_path: str) -> None:
    text = TextConfig(kind="pretrained", name=str(tmp_path / "t5"), max_length=14)
    small = TextConfig(kind="small", width=16, heads=2, layers=1)
    captions = [Images(DataConfig(image_size=16)).caption(i) for i in range(4)]
    tokenizer = train_tokenizer(captions, small)
    encoder = T5EncoderModel(small_t5(small, len(tokenizer))).eval()
    encoder.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    options = {"num_images": 4, "num_validation_images": 0}
    cache_latents(cache_config(tmp_path / "cache", vae_path, text=text, **options))
    latents = CachedLatents(tmp_path / "cache")
    with torch.no_grad():
        expected = encode_captions(encoder, tokenizer, [*captions, ""], 14)
    torch.testing.assert_close(torch.stack([latents[i]["cond"] for i in range(4)]), expected[:4])
    torch.testing.assert_close(latents.null_cond, expected[4])
    assert expected[:, -1].abs().max() == 0  # padding, which is not in the files
    assert load_cached_text(text, latents.manifest["text"])[1].get_vocab() == tokenizer.get_vocab()
    encoder.shared.weight.data[0] += 1
    encoder.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"encoded with other weights than text.name '.*' has now"):
        load_cached_text(text, latents.manifest["text"])
    settings = {"text.kind": "pretrained", "text.name": text.name, "text.max_length": 14, "data.source": "latents"}
    settings |= {"data.path": tmp_path / "cache", "data.image_size": 16, "vae.name": vae_path, "train.steps": 1}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with pytest.raises(ValueError, match=r"encoded with other weights than text.name '.*' has now"):  # before it trains
        train(tmp_path / "run", *words, flow=TEXT_FLOW)
    assert not (tmp_path / "run").exists()


def test_autoencoders_without_a_posterior_have_no_deviation(tmp_path: Path) -> None:
    channels = {f"{side}_block_out_channels": (8, 8, 8) for side in ("encoder", "decoder")}
    vae = AutoencoderTiny(**channels, latent_channels=3, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))
    vae.save_pretrained(tmp_path / "vae")
    cache_latents(cache_config(tmp_path / "cache", str(tmp_path / "vae"), dtype="float16", num_images=8))
    latents, image = CachedLatents(tmp_path / "cache"), Images(DataConfig(image_size=16))[7]["image"]
    expected = LatentCodec(load_autoencoder(str(tmp_path / "vae"))).encode(to_model(image[None]))[0]
    torch.testing.assert_close(latents[7]["latent_mean"], expected, rtol=2**-10, atol=1e-4)
    assert torch.equal(latents[7]["latent_std"], torch.zeros_like(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": VaeConfig(name="none")}, "vae.name is none"),
        ({"data": DataConfig(source="latents", path="x")}, "a cache is made of pictures"),
        ({"num_images": None}, "is endless: say with num_images how many"),
        ({"num_validation_images": None}, "say with num_validation_images"),
        ({"data": DataConfig(image_size=18)}, "must be a multiple of 4"),
        ({"unit": 3}, "must be a multiple of 12"),
        ({"aspect_ratios": ["4x3"]}, "must be like 4:3"),
        ({"aspect_ratios": []}, "aspect_ratios is empty"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be 0 or positive"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path: Path, vae_path: str, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_latents(cache_config(tmp_path / "cache", vae_path, **changes))
    assert not (tmp_path / "cache").exists()


def test_numbers_that_do_not_fit_are_an_error(tmp_path: Path, vae_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentCodec, "encode_posterior", lambda self, images: (torch.full((5, 3, 4, 4), 1e6), None))
    with pytest.raises(ValueError, match="latent_mean is not finite in float16: take bfloat16"):
        cache_latents(cache_config(tmp_path, vae_path, dtype="float16"))


def test_what_is_no_cache(cached: Path, own: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no latent cache in .*cache-latents"):
        CachedLatents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'train' or 'validation', got 'test'"):
        CachedLatents(cached, "test")
    with pytest.raises(ValueError, match=r"data\.path must name a folder made by tarflow cache-latents"):
        DataConfig(source="latents")
    with pytest.raises(ValueError, match="pictures are needed here"):
        open_source(DataConfig(source="latents", path=str(cached)), "train")
    manifest = json.loads((own / "manifest.json").read_text())
    for text, message in (
        ("{", "is no manifest of a latent cache"),
        (json.dumps({**manifest, "format": "tarflow latents 0"}), "expected 'tarflow latents 1': make the cache anew"),
    ):
        (own / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            CachedLatents(own)
    (own / "manifest.json").write_text(json.dumps({**manifest, "flip": False}))
    with pytest.raises(ValueError, match="has no mirrored pictures"):
        CachedLatents(own, flip=True)


def test_the_command_line_fills_the_settings() -> None:
    arguments = ["--output", "x", "--data.source", "drawings", "--aspect_ratios", '["1:1", "4:3"]', "--flip", "true"]
    config, _ = parse_dataclass(CacheConfig, [*arguments, "--text.kind", "small"])
    assert (config.aspect_ratios, config.flip, config.text.kind) == (["1:1", "4:3"], True, "small")
    assert math.prod(bucket_size(4 / 3, 256, 8)) == pytest.approx(256**2, rel=0.05)


def test_earlier_caches_are_known_again() -> None:
    """Settings that came later stand in a cache's settings only where they are set."""
    first = {"source": "drawings", "image_size": 64, "train_split": "train", "image_column": "image", "seed": 0}
    first |= {"validation_fraction": 0.02, "background": "white", "split_folders": "auto", "more_caption_templates": []}
    nothing = ("path", "name", "data_files", "validation_split", "caption_column", "label_column", "caption_template")
    first |= dict.fromkeys((*nothing, "where", "class_names"))
    assert data_settings(DataConfig(cache_gb=3.0, on_error="skip")) == first
    assert data_settings(DataConfig(source="datasets", name="x", streaming=True)) == {
        **first,
        "source": "datasets",
        "name": "x",
        "streaming": True,
    }

"""Published checkpoints and configurations as pipeline folders; bad ones give one sentence and no folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT
from safetensors.torch import load_file
from transformers import T5EncoderModel

from tarflow import TARFlowPipeline
from tarflow.cli.convert import main as convert
from tarflow.pipeline import conversion
from tarflow.pipeline.call.aspect import ASPECT_RATIOS, aspect_size, fill_template, nearest_aspect_ratio
from tarflow.pipeline.conversion import convert_checkpoint, load_published, read_class_names
from tarflow.pipeline.published import published_from_yaml, read_published_config
from tarflow.training.flow.config import TextConfig
from tarflow.training.flow.text import small_t5, train_tokenizer

REFERENCE = ROOT / "tests" / "reference"
#: tests/reference/starflow_text/config.json in the published YAML's form.
YAML = [
    *({"img_size": 64}, {"txt_size": 6}, {"channel_size": 4}, {"patch_size": 1}, {"channels": 64}, {"blocks": 3}),
    *({"layers_per_block": "1 1 3"}, {"head_dim": 32}, {"noise_std": 0.3}, {"nvp": 1}, {"rope": 1}, {"sos": 1}),
    *({"use_softplus": 1}, {"cond_top_only": 1}, {"use_final_norm": 1}, {"seq_order": "L2R"}, {"soft_clip": 4}),
    *({"vae": "stabilityai/sd-vae-ft-ema"}, {"text": "google/flan-t5-xl"}, {"cfg": 2.5}, {"drop_label": 0.1}),
]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A .pth of tests/reference/starflow_text and its YAML."""
    torch.save(load_file(REFERENCE / "starflow_text" / "model.safetensors"), tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"arguments": YAML}))
    return tmp_path


def text_encoder(folder: Path, width: int) -> str:
    """A small T5 encoder with its tokenizer, saved."""
    config = TextConfig(kind="small", width=width, heads=2, layers=1, max_length=6)
    tokenizer = train_tokenizer(["a red ring"], config)
    T5EncoderModel(small_t5(config, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_converted_pipeline_samples_as_the_published_code(published: Path, capsys) -> None:
    output = published / "pipeline"
    arguments = ["--checkpoint", published / "model.pth", "--config", published / "config.yaml", "--output", output]
    encoder = text_encoder(published / "t5", 24)
    convert([*map(str, arguments), "--text-encoder", encoder])
    assert "Apple Machine Learning Research Model License Agreement" in capsys.readouterr().out
    assert "research purposes only" in (output / "README.md").read_text()
    pipe = TARFlowPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.config.noise_std, pipe.config.guidance_scale, pipe.config.max_sequence_length) == (0.3, 3.5, 6)
    expected = load_file(REFERENCE / "starflow_text" / "expected.safetensors")
    key = next(name for name in expected if re.fullmatch(r"sample_guidance[1-9.]+", name))
    given = {"prompt_embeds": expected["cond"], "negative_prompt_embeds": expected["null_cond"]}
    scale = 1 + float(key.removeprefix("sample_guidance"))
    noise = expected["prior_noise"]
    sample = pipe(**given, guidance_scale=scale, latents=noise, denoise=False, output_type="latent").images
    assert (sample - expected[key]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="no autoencoder to decode 4 channels"):
        pipe("a red ring")
    assert pipe("a red ring", output_type="latent", aspect_ratio="2:3").images.shape == (1, 4, 10, 7)


@pytest.mark.parametrize("name", ["starflow_text", "starflow_gqa_swiglu", "tarflow_volume_preserving"])
def test_shards_hold_every_number(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 10**5)
    checkpoint, config = REFERENCE / name / "model.safetensors", REFERENCE / name / "config.json"
    output = convert_checkpoint(checkpoint, config, tmp_path / "pipeline", dtype="bfloat16")
    shards = list((output / "flow").glob("*.safetensors"))
    assert len(shards) > 1
    assert (output / "flow" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    flow = TARFlowPipeline.from_pretrained(output, torch_dtype=torch.bfloat16).flow
    expected = load_published(checkpoint, config)[0].state_dict()
    assert flow.state_dict().keys() == expected.keys()
    for key, value in flow.state_dict().items():
        assert torch.equal(value, expected[key].to(torch.bfloat16)), key
    if name == "tarflow_volume_preserving":
        stored = [tensors for path in shards if "prior_variance" in (tensors := load_file(path))]
        assert torch.equal(stored[0]["prior_variance"], expected["prior_variance"])  # float32


def test_yaml_and_json_say_the_same() -> None:
    from_json = read_published_config(REFERENCE / "starflow_text" / "config.json").model
    from_yaml = published_from_yaml(YAML, 8).model
    assert {**from_yaml, **from_json} == {**from_yaml, "txt_dim": from_json["txt_dim"]}
    wide = published_from_yaml([*YAML, {"mix_aspect": 1}], 8)
    assert wide.caption_template == "{prompt}\n in a {aspect_ratio} aspect ratio.\n"
    assert fill_template(wide.caption_template, ["a cat", ""], "3:2")[1] == "\n in a 3:2 aspect ratio.\n"


def test_class_names_and_noise_of_the_file_name(tmp_path: Path) -> None:
    folder = REFERENCE / "tarflow_volume_preserving"
    checkpoint = tmp_path / "mnist_model_2_64_4_1_0.07.safetensors"
    shutil.copy(folder / "model.safetensors", checkpoint)
    (tmp_path / "names.txt").write_text("cat\ndog\nwild\n")
    output = convert_checkpoint(
        checkpoint, folder / "config.json", tmp_path / "pipeline", class_names=tmp_path / "names.txt"
    )
    pipe = TARFlowPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.noise_std == 0.07
    assert pipe(class_labels="dog", guidance_scale=2.0, output_type="pt").images.shape == (1, 1, 8, 8)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="names 2 classes, but the model has 3"):
        convert_checkpoint(checkpoint, folder / "config.json", tmp_path / "x", class_names=tmp_path / "names.txt")


def test_an_empty_folder_with_a_card_of_ones_own_is_taken(tmp_path: Path) -> None:
    folder = REFERENCE / "tarflow_volume_preserving"
    (tmp_path / "pipeline" / ".git").mkdir(parents=True)
    (tmp_path / "pipeline" / "README.md").write_text("mine")
    output = convert_checkpoint(folder / "model.safetensors", folder / "config.json", tmp_path / "pipeline")
    assert (output / "README.md").read_text() == "mine"
    assert (output / ".git").is_dir()
    assert TARFlowPipeline.from_pretrained(output).flow.config.num_classes == 3


def with_yaml(folder: Path, *entries: dict) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({"arguments": [*YAML, *entries]}))


def truncate(folder: Path) -> None:
    data = (folder / "model.pth").read_bytes()
    (folder / "model.pth").write_bytes(data[: len(data) // 2])


def not_tensors(folder: Path) -> None:
    torch.save({"blocks.0.proj_in.weight": [1, 2]}, folder / "model.pth")


def a_class(folder: Path) -> None:
    torch.save({"model": Path("x")}, folder / "model.pth")


def without_a_tensor(folder: Path) -> None:
    state = torch.load(folder / "model.pth", weights_only=True)
    del state["blocks.0.proj_in.bias"]
    torch.save(state, folder / "model.pth")


def tarflow_json(folder: Path) -> None:
    (folder / "config.yaml").write_text((REFERENCE / "tarflow_uncond" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, r"cannot read the checkpoint .*model\.pth"),
        (lambda folder: (folder / "model.pth").write_text("hello"), r"cannot read the checkpoint .*model\.pth"),
        (lambda folder: (folder / "model.pth").unlink(), r"cannot read the checkpoint .*model\.pth"),
        (not_tensors, "holds a list under 'blocks.0.proj_in.weight', expected tensors only"),
        (a_class, r"cannot read the checkpoint .*model\.pth"),
        (without_a_tensor, r"missing tensors: \['blocks\.0\.proj_in\.bias'\]"),
        (lambda folder: with_yaml(folder, {"use_magic": 1}), "unknown key 'use_magic' in the YAML"),
        (lambda folder: with_yaml(folder, {"temporal_causal": 2}), "temporal_causal: 2, which is not implemented"),
        (lambda folder: with_yaml(folder, {"use_qk_norm": 1}), "missing tensors: .*query_norm"),
        (tarflow_json, "describes a TARFlow model, but the checkpoint holds a STARFlow model"),
        (lambda folder: (folder / "config.yaml").write_text("just text"), "neither a JSON of model arguments nor"),
        (lambda folder: (folder / "config.yaml").write_text('{"in_channels": 3'), "cannot read the config"),
    ],
)
def test_bad_input_gives_one_sentence_and_no_folder(published: Path, change, message: str) -> None:
    change(published)
    with pytest.raises(ValueError, match=message) as caught:
        convert_checkpoint(published / "model.pth", published / "config.yaml", published / "pipeline")
    assert "\n" not in str(caught.value)
    assert not list(published.glob("pipeline*"))


def test_other_bad_input(published: Path, monkeypatch) -> None:
    paths = (published / "model.pth", published / "config.yaml")
    with pytest.raises(ValueError, match="gives 16 numbers per token, but the checkpoint takes 24"):
        convert_checkpoint(*paths, published / "pipeline", text_encoder=text_encoder(published / "t5", 16))
    folder = REFERENCE / "tarflow_uncond"
    with pytest.raises(ValueError, match="'none' and takes no text encoder"):
        convert_checkpoint(
            folder / "model.safetensors", folder / "config.json", published / "pipeline", text_encoder="anything"
        )
    monkeypatch.setattr(conversion, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(*paths, published / "pipeline")
    assert not list(published.glob("pipeline*"))
    (published / "pipeline" / "flow").mkdir(parents=True)
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint(*paths, published / "pipeline")
    (published / "family.json").write_text(json.dumps({"family": "starflow", "model": {"in_channels": 3}}))
    with pytest.raises(ValueError, match="says family 'starflow', but has the arguments of 'tarflow'"):
        read_published_config(published / "family.json")


def test_aspect_ratios() -> None:
    for name in ASPECT_RATIOS:
        height, width = aspect_size(name, 256, 8)
        assert height % 8 == width % 8 == 0
        assert height * width == pytest.approx(256**2, rel=0.05)
        assert nearest_aspect_ratio(height, width) == name
    assert aspect_size("16:9", 256, 8) == (192, 344)
    with pytest.raises(ValueError, match=r"must be one of 21:9, .*, got '7:5'"):
        aspect_size("7:5", 256, 8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"0": "tench", "1": "goldfish"}', {0: "tench", 1: "goldfish"}),
        ('["tench", "goldfish"]', {0: "tench", 1: "goldfish"}),
        ('{"1": "tench", "2": "goldfish"}', "are not those from 0 to 1"),
        ('{"tench": 0, "goldfish": 1}', "are not those from 0 to 1"),
        ('"ab"', "no JSON list of texts"),
        ("3", "no JSON list of texts"),
        ("[1, 2]", "no JSON list of texts"),
    ],
)
def test_class_names_of_json(content: str, expected: dict[int, str] | str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(content)
    if isinstance(expected, dict):
        assert read_class_names(tmp_path / "names.json", 2) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            read_class_names(tmp_path / "names.json", 2)


@pytest.mark.parametrize("entries", [[1], [{"cfg": ""}], [{"noise_std": None}]])
def test_settings_of_a_wrong_kind_are_a_sentence(entries: list[object], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"arguments": entries}))
    with pytest.raises(ValueError, match="config\\.yaml"):
        read_published_config(tmp_path / "config.yaml")


def test_folders_below_the_home_folder(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(published))
    convert(["--checkpoint", "~/model.pth", "--config", "~/config.yaml", "--output", "~/made"])
    assert (published / "made" / "model_index.json").is_file()
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint("~/model.pth", "~/config.yaml", "~/made", noise_std=0.9)
    assert TARFlowPipeline.from_pretrained("~/made").config.noise_std == 0.3

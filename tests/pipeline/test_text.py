"""Text encoders of many families: encoding, training, saving, drawing, and what is said of captions that are too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from huggingface_hub import constants
from text_models import CONFIGS, LAYERS, POSITIONS, WIDTH, make_encoder, make_tokenizer, saved
from trainings import CLASS_FLOW, train

from tarflow import TARFlowPipeline, TrajectoryFlowModel
from tarflow.data.config import DataConfig
from tarflow.data.latents import CachedLatents
from tarflow.evaluation.samples.record import pipeline_hash
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.text.encoding import cut_captions, encode_captions, position_count, token_ids
from tarflow.pipeline.text.loading import load_text_encoder
from tarflow.pipeline.text.options import TextOptions
from tarflow.training.flow.config import TextConfig, VaeConfig
from tarflow.training.flow.objective import FlowObjective
from tarflow.training.flow.text import LOOKED_AT, check_text
from tarflow.training.flow.tokens import CaptionTokens
from tarflow.training.latent_cache.caching import cache_latents
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.training.loop.parallel import layer_classes

FLOW = CLASS_FLOW.replace("class_prefix", "prefix")
SHORT, LONG = "a red circle", "a small red circle on a dark background"


def pretrained(name: str, *arguments: str) -> list[str]:
    """Arguments of a run of two steps with a pretrained text encoder."""
    text = ["--text.kind", "pretrained", "--text.name", name, "--text.max_length", "12"]
    return [*text, "--train.steps", "2", *arguments]


def drawing(pipe: Any, prompt: str = SHORT) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, output_type="latent", decoding="sequential", generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("family", CONFIGS)
def test_each_family_pads_on_the_right_and_zeroes_padding(family: str) -> None:
    encoder, tokenizer = make_encoder(family), make_tokenizer(padding_side="left")
    hidden = encode_captions(encoder, tokenizer, [SHORT, LONG, ""], 12)
    assert hidden.shape == (3, 12, WIDTH)
    assert not hidden.requires_grad
    lengths = [(row != 0).any(-1).sum().item() for row in hidden]
    assert lengths == [5, 10, 2]
    assert hidden[0, 5:].abs().max() == 0
    alone = tokenizer(SHORT, return_tensors="pt")
    if family != "SiglipTextModel":  # trained to see padding
        with torch.no_grad():
            expected = encoder(**{key: alone[key] for key in ("input_ids", "attention_mask")}).last_hidden_state[0]
        torch.testing.assert_close(hidden[0, :5], expected, rtol=1e-4, atol=1e-5)


def test_siglip_sees_its_padding_as_in_its_training() -> None:
    encoder, tokenizer = make_encoder("SiglipTextModel"), make_tokenizer()
    ids, _ = token_ids(tokenizer, [SHORT], 12)
    with torch.no_grad():
        expected = encoder(input_ids=ids).last_hidden_state[0]
    hidden = encode_captions(encoder, tokenizer, [SHORT], 12)[0]
    torch.testing.assert_close(hidden[:5], expected[:5])
    assert hidden[5:].abs().max() == 0


def test_tokenizers_without_padding_or_ends() -> None:
    encoder = make_encoder("Qwen3Model")
    tokenizer = make_tokenizer(ends=False, pad=False)
    hidden = encode_captions(encoder, tokenizer, [SHORT, ""], 8)
    expected = encode_captions(encoder, make_tokenizer(ends=False), [SHORT], 3)
    torch.testing.assert_close(hidden[0, :3], expected[0], rtol=1e-4, atol=1e-5)
    assert hidden[1].abs().max() == 0  # nothing at all, and no NaN


@pytest.mark.parametrize("family", ["T5EncoderModel", "CLIPTextModel", "BertModel", "Qwen3Model"])
def test_hidden_layers_are_those_of_transformers(family: str) -> None:
    encoder, tokenizer = make_encoder(family), make_tokenizer()
    alone = tokenizer(SHORT, return_tensors="pt")
    with torch.no_grad():
        states = encoder(alone.input_ids, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    for layer in (-2, 0, 1):
        hidden = encode_captions(encoder, tokenizer, [SHORT], 7, TextOptions(hidden_layer=layer))
        torch.testing.assert_close(hidden[0, :5], states[layer][0], rtol=1e-4, atol=1e-5)
        assert hidden[0, 5:].abs().max() == 0
    last = encode_captions(encoder, tokenizer, [SHORT], 7)
    assert not torch.allclose(last, encode_captions(encoder, tokenizer, [SHORT], 7, TextOptions(hidden_layer=-2)))


def test_prefix_and_chat_template() -> None:
    tokenizer = make_tokenizer(chat=True)

    def words(options: TextOptions) -> list[str]:
        ids, mask = token_ids(tokenizer, [SHORT], 14, options)
        return tokenizer.convert_ids_to_tokens(ids[0][mask[0].bool()].tolist())

    caption = SHORT.split()
    assert words(TextOptions()) == ["<s>", *caption, "</s>"]
    assert words(TextOptions(prefix="on a ")) == ["<s>", "on", "a", *caption, "</s>"]
    assert words(TextOptions(chat_template=True)) == ["user", ":", *caption, "answer", ":"]
    both = TextOptions(prefix="on a ", chat_template=True)
    assert words(both) == ["user", ":", "on", "a", *caption, "answer", ":"]


def test_positions_are_counted() -> None:
    counts = {family: position_count(make_encoder(family)) for family in CONFIGS}
    assert counts["CLIPTextModel"] == counts["SiglipTextModel"] == counts["BertModel"] == POSITIONS
    assert counts["RobertaModel"] == POSITIONS - 2
    assert counts["Qwen3Model"] == counts["Gemma2Model"] == 64
    assert counts["T5EncoderModel"] is counts["UMT5EncoderModel"] is None
    unbounded = transformers.XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=8)
    assert position_count(transformers.XLNetModel(unbounded)) is None
    encoder = make_encoder("RobertaModel")
    full = " ".join(["a"] * 30)
    assert encode_captions(encoder, make_tokenizer(), [full], POSITIONS - 2).isfinite().all()


@pytest.mark.parametrize(
    ("family", "length", "options", "message"),
    [
        ("CLIPTextModel", 21, {}, "to have 21 tokens, but the text encoder, a CLIPTextModel, has positions for 20"),
        ("BertModel", 2, {}, "to have 2 tokens, of which the tokenizer needs 2 .* to at least 3"),
        ("Qwen3Model", 8, {"hidden_layer": 4}, r"hidden_layer is 4, but the text encoder has 3 layers: 0 .* to -4"),
        ("T5EncoderModel", 8, {"hidden_layer": -5}, "hidden_layer is -5, but the text encoder has 3 layers"),
        ("Gemma2Model", 8, {"chat_template": True}, "the tokenizer has no chat template"),
    ],
)
def test_what_an_encoder_cannot_do_is_a_sentence(family: str, length: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_captions(make_encoder(family), make_tokenizer(), [SHORT], length, TextOptions(**options))


def test_a_tokenizer_of_another_model_is_a_sentence() -> None:
    encoder = make_encoder("BertModel", vocab_size=8)
    with pytest.raises(ValueError, match="gives token 15, but the text encoder has embeddings for 8"):
        encode_captions(encoder, make_tokenizer(), [LONG], 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "small", "prefix": "a "}, "text.prefix is for text.kind 'pretrained', but text.kind is 'small'"),
        ({"kind": "none", "hidden_layer": -2}, "text.hidden_layer is for text.kind 'pretrained'"),
        ({"kind": "small", "name": "google/t5"}, r"leave text\.name out, which is 'google/t5'"),
        ({"kind": "small", "tokenizer_subfolder": "t"}, "text.tokenizer_subfolder is for text.kind 'pretrained'"),
    ],
)
def test_options_without_effect_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(**arguments)


def test_options_of_a_pipeline_are_checked() -> None:
    flow = TARFlowModel(in_channels=3, sample_size=4, width=32, head_dim=32, conditioning="prefix", cond_dim=WIDTH)
    assert TARFlowPipeline(flow).config.text_options is None
    assert TARFlowPipeline(flow, text_options={"hidden_layer": -1}).config.text_options is None
    with pytest.raises(ValueError, match="text_options has 'layer', which is none of hidden_layer, prefix, chat"):
        TARFlowPipeline(flow, text_options={"layer": 3})
    with pytest.raises(ValueError, match="hidden_layer must be a whole number"):
        TARFlowPipeline(flow, text_options={"hidden_layer": "last"})


RUNS = {
    "T5EncoderModel": [],
    "CLIPTextModel": ["--text.hidden_layer", "-2"],
    "SiglipTextModel": [],
    "BertModel": ["--text.prefix", "on a "],
    "Qwen3Model": ["--text.hidden_layer", "2", "--text.chat_template", "true", "--text.max_length", "16"],
    "Gemma2Model": [],
}


@pytest.mark.parametrize("family", RUNS)
def test_train_save_load_draw(family: str, tmp_path: Path) -> None:
    encoder, tokenizer = make_encoder(family), make_tokenizer(chat=True, padding_side="left")
    name = saved(tmp_path / "encoder", encoder, tokenizer)
    trainer, _ = train(tmp_path / "run", *pretrained(name, *RUNS[family]), flow=FLOW)
    assert not trainer.task.parts.text_encoder.training
    assert not any(parameter.requires_grad for parameter in trainer.task.parts.text_encoder.parameters())
    index = json.loads((tmp_path / "run/pipeline/model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", family]
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "run/pipeline")
    text = trainer.task.config.text
    inputs = trainer.task.inputs.conditions({"caption": [SHORT, LONG]}, torch.tensor([False, True]))["cond"]
    embeds, null = pipe.encode_prompt(prompt=SHORT, negative_prompt=None, device=torch.device("cpu"))
    torch.testing.assert_close(embeds, inputs[:1])
    torch.testing.assert_close(null, inputs[1:])
    expected = encode_captions(encoder, tokenizer, [SHORT, ""], text.max_length, text.options)
    torch.testing.assert_close(torch.cat([embeds, null]), expected)
    assert (embeds - null).abs().max() > 0.01
    images = drawing(pipe)
    assert images.isfinite().all()
    pipe.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(drawing(TARFlowPipeline.from_pretrained(tmp_path / "again")), images)


def test_pipelines_without_the_options_load(tmp_path: Path) -> None:
    flow = TARFlowModel(in_channels=3, sample_size=4, width=32, head_dim=32, conditioning="prefix", cond_dim=WIDTH)
    pipe = TARFlowPipeline(flow, None, make_encoder("BertModel"), make_tokenizer(), max_sequence_length=8)
    pipe.save_pretrained(tmp_path / "old")
    index = json.loads((tmp_path / "old/model_index.json").read_text())
    del index["text_options"]
    (tmp_path / "old/model_index.json").write_text(json.dumps(index))
    torch.testing.assert_close(drawing(TARFlowPipeline.from_pretrained(tmp_path / "old")), drawing(pipe))


def test_fine_tuning_keeps_the_options(tmp_path: Path) -> None:
    name = saved(tmp_path / "encoder", make_encoder("BertModel"), make_tokenizer())
    train(tmp_path / "run", *pretrained(name, "--text.hidden_layer", "-2"), flow=FLOW)
    start = ["--init_from", str(tmp_path / "run/pipeline")]
    with pytest.raises(ValueError, match=r"text.hidden_layer is -1, but the pipeline .* was trained with -2"):
        train(tmp_path / "other", *pretrained(name, *start), flow="{}")
    with pytest.raises(ValueError, match=r"text.kind is 'small', but the pipeline .* has a pretrained BertModel"):
        train(tmp_path / "other", "--text.kind", "small", "--train.steps", "1", *start, flow="{}")
    train(tmp_path / "same", *pretrained(name, *start, "--text.hidden_layer", "-2"), flow="{}")


def test_resuming_keeps_options_and_encoder(tmp_path: Path) -> None:
    name = saved(tmp_path / "encoder", make_encoder("BertModel"), make_tokenizer())
    other = saved(tmp_path / "other", make_encoder("BertModel"), make_tokenizer())
    run = [*pretrained(name, "--text.prefix", "a "), "--log.checkpoint_every", "1"]
    train(tmp_path / "run", *run, flow=FLOW)
    resumed = [*run, "--train.steps", "3", "--resume", "latest"]
    for changes, message in (
        (["--text.prefix", "on "], "was trained with text.prefix 'a ', but it is 'on ' here: set it so"),
        (["--text.hidden_layer", "-2"], "was trained with text.hidden_layer -1, but it is -2 here"),
        (["--text.max_length", "14"], "was trained with text.max_length 12, but it is 14 here"),
        (["--text.name", other], "was trained with another text encoder than text.name gives"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", *resumed, *changes, flow=FLOW)
    trainer, _ = train(tmp_path / "run", *resumed, flow=FLOW)
    assert trainer.step == 3
    facts = trainer.task.text
    check_text(tmp_path, None, facts)  # a checkpoint of before they were kept
    check_text(tmp_path, facts, {key: value for key, value in facts.items() if key != "encoder"})  # cached captions
    with pytest.raises(ValueError, match=r"was trained with text.kind 'pretrained', but it is 'none' here"):
        check_text(tmp_path, facts, None)


def test_encoders_in_16_bits(tmp_path: Path) -> None:
    name = saved(tmp_path / "encoder", make_encoder("Qwen3Model").to(torch.bfloat16), make_tokenizer())
    trainer, _ = train(tmp_path / "run", *pretrained(name), flow=FLOW)
    assert trainer.task.parts.text_encoder.dtype is torch.bfloat16
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "run/pipeline")  # in float32, as ever
    embeds, _ = pipe.encode_prompt(prompt=SHORT, negative_prompt=None, device=torch.device("cpu"))
    trained = trainer.task.inputs.conditions({"caption": [SHORT]}, torch.tensor([False]))["cond"]
    assert (embeds - trained).abs().max() < 0.05 * embeds.abs().max()
    train(tmp_path / "on", *pretrained(name, "--init_from", str(tmp_path / "run/pipeline")), flow="{}")


def test_records_of_images_tell_options_apart() -> None:
    flow = TARFlowModel(in_channels=3, sample_size=4, width=32, head_dim=32, conditioning="prefix", cond_dim=WIDTH)
    pipe = TARFlowPipeline(flow)
    own = pipeline_hash(pipe)
    assert pipeline_hash(TARFlowPipeline(flow, text_options={"prefix": "a "})) != own
    pipe._internal_dict = FrozenDict({key: value for key, value in pipe.config.items() if key != "text_options"})
    assert pipeline_hash(pipe) == own, "a pipeline of before there were options is another one"


@pytest.mark.parametrize(
    ("kind", "setting", "other"),
    [(TARFlowModel, "deep_order", "coarse_to_fine"), (TrajectoryFlowModel, "transporter_levels", True)],
)
def test_flows_of_before_a_setting_are_no_others(kind: Any, setting: str, other: Any) -> None:
    def made(**options: Any) -> TARFlowPipeline:
        torch.manual_seed(0)
        flow = kind(in_channels=3, sample_size=4, layers_per_block=(1, 1), width=32, head_dim=32, **options)
        return TARFlowPipeline(flow, noise_std=0.1)

    pipe = made()
    own = pipeline_hash(pipe)
    pipe.flow._internal_dict = FrozenDict({key: value for key, value in pipe.flow.config.items() if key != setting})
    assert pipeline_hash(pipe) == own != pipeline_hash(made(**{setting: other}))


PLACES = {
    "one folder": ("enc", "enc", {"subfolder": "enc"}),
    "a folder of Diffusers": ("text_encoder", "tokenizer", {"subfolder": "text_encoder"}),
    "its second encoder": ("text_encoder_2", "tokenizer_2", {"subfolder": "text_encoder_2"}),
    "deeper": ("a/text_encoder", "a/tokenizer", {"subfolder": "a/text_encoder"}),
    "tokenizer in the root": ("enc", "", {"subfolder": "enc"}),
    "encoder in the root": ("", "words", {"tokenizer_subfolder": "words"}),
    "both named": ("enc", "words", {"subfolder": "enc", "tokenizer_subfolder": "words"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_encoder_and_tokenizer_are_found(place: str, tmp_path: Path) -> None:
    encoder_folder, tokenizer_folder, arguments = PLACES[place]
    encoder, tokenizer = make_encoder("T5EncoderModel"), make_tokenizer()
    encoder.save_pretrained(tmp_path / encoder_folder)
    tokenizer.save_pretrained(tmp_path / tokenizer_folder)
    found, words = load_text_encoder(str(tmp_path), **arguments)
    assert words.get_vocab() == tokenizer.get_vocab()
    expected = encode_captions(encoder, tokenizer, [SHORT], 8)
    torch.testing.assert_close(encode_captions(found, words, [SHORT], 8), expected)


def test_encoders_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--someone--pictures"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    encoder, tokenizer = make_encoder("CLIPTextModel"), make_tokenizer()
    encoder.save_pretrained(repository / "snapshots" / commit / "text_encoder")
    tokenizer.save_pretrained(repository / "snapshots" / commit / "tokenizer")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found, words = load_text_encoder("someone/pictures", "text_encoder")
    expected = encode_captions(encoder, tokenizer, [SHORT], 8)
    torch.testing.assert_close(encode_captions(found, words, [SHORT], 8), expected)
    with pytest.raises(ValueError, match=r"cannot load the text encoder 'someone/else': We couldn't connect to"):
        load_text_encoder("someone/else")


def test_no_tokenizer_is_made_up(tmp_path: Path) -> None:
    make_encoder("T5EncoderModel").save_pretrained(tmp_path / "enc")
    for subfolder, looked in ((None, "its root"), ("enc", "'enc' or its root")):
        place = tmp_path / "enc" if subfolder is None else tmp_path
        with pytest.raises(ValueError, match=f"there is no tokenizer in {looked}: name the folder with"):
            load_text_encoder(str(place), subfolder)


def composite(kind: str) -> Any:
    """A model that sees pictures too."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    if kind in ("CLIP", "Siglip"):
        text = CONFIGS[f"{kind}TextModel"][1]
        config = getattr(transformers, f"{kind}Config")(
            text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}
        )
        return getattr(transformers, f"{kind}Model")(config)
    text = {**CONFIGS["Qwen3Model"][1], "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "Gemma3":
        config = transformers.Gemma3Config(
            text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4
        )
        return transformers.Gemma3ForConditionalGeneration(config)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("CLIP", "CLIPTextModel"),
        ("Siglip", "SiglipTextModel"),
        ("Gemma3", "Gemma3TextModel"),
        ("Qwen2_5_VL", "Qwen2_5_VLTextModel"),
    ],
)
def test_the_text_part_of_models_that_see_pictures(kind: str, part: str, tmp_path: Path) -> None:
    model, tokenizer = composite(kind).eval(), make_tokenizer()
    name = saved(tmp_path / "encoder", model, tokenizer)
    encoder, words = load_text_encoder(name)
    assert type(encoder).__name__ == part
    own = model.text_model if kind in ("CLIP", "Siglip") else model.model.language_model
    expected = encode_captions(own, tokenizer, [SHORT, LONG], 12)
    torch.testing.assert_close(encode_captions(encoder, words, [SHORT, LONG], 12), expected)
    flow = TARFlowModel(in_channels=3, sample_size=4, width=32, head_dim=32, conditioning="prefix", cond_dim=WIDTH)
    TARFlowPipeline(flow, None, encoder, words, max_sequence_length=12).save_pretrained(tmp_path / "pipe")
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "pipe")
    assert type(pipe.text_encoder).__name__ == part
    embeds, _ = pipe.encode_prompt(prompt=[SHORT, LONG], negative_prompt=None, device=torch.device("cpu"))
    torch.testing.assert_close(embeds, expected)


@pytest.mark.parametrize("family", ["T5ForConditionalGeneration", "Qwen3ForCausalLM", "BertForMaskedLM"])
def test_heads_and_decoders_are_left_out(family: str, tmp_path: Path) -> None:
    base = {"T5ForConditionalGeneration": "T5EncoderModel", "Qwen3ForCausalLM": "Qwen3Model"}.get(family, "BertModel")
    name, arguments = CONFIGS[base]
    model = getattr(transformers, family)(getattr(transformers, name)(**arguments)).eval()
    place = saved(tmp_path / "encoder", model, make_tokenizer())
    first, words = load_text_encoder(place)
    assert type(first).__name__ == base
    own = model.encoder if family.startswith("T5") else model.base_model
    torch.testing.assert_close(
        encode_captions(first, words, [SHORT], 8), encode_captions(own, words, [SHORT], 8), rtol=1e-5, atol=1e-6
    )
    # A masked language model has no pooler; what stands for it is the same at every loading.
    second = load_text_encoder(place)[0].state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.state_dict().items())


def test_what_is_no_text_encoder_is_a_sentence(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))
    bart = transformers.BartModel(
        transformers.BartConfig(
            vocab_size=32,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
        )
    )
    cut = make_encoder("BertModel")
    for name, model, message in (
        ("vit", vision, "it is a ViTModel, whose part is no text encoder"),
        ("bart", bart, "it is a BartModel, an encoder-decoder whose encoder Transformers has no class for"),
        ("cut", cut, "its files lack weights of a BertModel, for example encoder.layer.2"),
    ):
        place = saved(tmp_path / name, model, make_tokenizer())
        if name == "cut":
            weights = {key: value for key, value in model.state_dict().items() if "layer.2" not in key}
            model.save_pretrained(place, state_dict=weights)
        with pytest.raises(ValueError, match=rf"cannot load the text encoder '.*{name}': {message}"):
            load_text_encoder(place)
    make_encoder("BertModel").save_pretrained(tmp_path / "sd/text_encoder")
    (tmp_path / "sd/model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="it is a folder of a pipeline: name its text encoder with subfolder"):
        load_text_encoder(str(tmp_path / "sd"))


def test_a_frozen_encoder_inside_the_objective_has_no_dropout() -> None:
    encoder = make_encoder("T5EncoderModel", dropout_rate=0.5).requires_grad_(False)
    flow = TARFlowModel(in_channels=3, sample_size=4, width=32, head_dim=32, conditioning="prefix", cond_dim=WIDTH)
    objective = FlowObjective(flow, encoder, hidden_layer=-2)
    objective.train()
    assert flow.training
    tokenizer = make_tokenizer()
    hidden = objective.encoded(*token_ids(tokenizer, [SHORT], 8))
    expected = encode_captions(encoder, tokenizer, [SHORT], 8, TextOptions(hidden_layer=-2))
    torch.testing.assert_close(hidden, expected)
    trained = FlowObjective(flow, make_encoder("T5EncoderModel"))
    assert trained.train().text_encoder.training


def test_layers_that_are_sharded() -> None:
    found = {family: layer_classes(make_encoder(family)) for family in CONFIGS}
    assert found["T5EncoderModel"] == ["T5Block"]
    assert found["CLIPTextModel"] == ["CLIPEncoderLayer"]
    assert found["BertModel"] == ["BertLayer"]
    assert found["Qwen3Model"] == ["Qwen3DecoderLayer"]


@pytest.mark.parametrize("ends", [True, False])
def test_what_is_cut_off(ends: bool) -> None:
    tokenizer = make_tokenizer(ends=ends)
    assert cut_captions(tokenizer, [SHORT, LONG, ""], 10) == []
    length = 6 if ends else 4
    assert cut_captions(tokenizer, [SHORT, LONG, ""], length) == [(LONG, "on a dark background")]
    options = TextOptions(prefix="on a ")
    assert cut_captions(tokenizer, [SHORT, LONG], length, options)[0] == (SHORT, "circle")


def test_long_captions_are_reported(tmp_path: Path, capsys: Any, caplog: Any) -> None:
    name = saved(tmp_path / "encoder", make_encoder("BertModel"), make_tokenizer())
    train(tmp_path / "run", *pretrained(name, "--text.max_length", "6"), flow=FLOW, captions_looked_at=LOOKED_AT)
    said = capsys.readouterr().out
    assert (
        "of the 4096 captions that were looked at are longer than 6 tokens (text.max_length) and are cut, for example"
        in said
    )
    assert "background'" in said
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "run/pipeline")
    caplog.clear()
    drawing(pipe, SHORT)
    assert not caplog.records
    drawing(pipe, LONG)
    assert "1 of 1 captions are longer than 6 tokens" in caplog.text
    assert "cut off: ['on a dark background']" in caplog.text
    train(tmp_path / "fits", *pretrained(name), flow=FLOW)
    assert "longer than" not in capsys.readouterr().out


def test_small_encoders_report_too(tmp_path: Path, capsys: Any) -> None:
    train(tmp_path / "run", "--text.kind", "small", "--text.max_length", "5", "--train.steps", "1", flow=FLOW)
    assert "are longer than 5 tokens" in capsys.readouterr().out


@pytest.fixture
def small_vae(tmp_path: Path) -> str:
    """A saved random autoencoder of factor 2."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
    )
    vae.save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


def test_cached_captions_are_encoded_as_the_options_say(tmp_path: Path, small_vae: str, capsys: Any) -> None:
    encoder, tokenizer = make_encoder("Qwen3Model"), make_tokenizer(ends=False, padding_side="left")
    name = saved(tmp_path / "encoder", encoder, tokenizer)
    text = TextConfig(kind="pretrained", name=name, max_length=6, hidden_layer=-2, prefix="on ")
    cache_latents(
        CacheConfig(
            output=str(tmp_path / "cache"),
            data=DataConfig(image_size=16),
            vae=VaeConfig(name=small_vae),
            text=text,
            dtype="float32",
            num_images=8,
            num_validation_images=2,
        )
    )
    assert "10 of the 10 captions are longer than 6 tokens" in capsys.readouterr().out
    latents = CachedLatents(tmp_path / "cache")
    captions = [latents.caption(index) for index in range(8)]
    expected = encode_captions(encoder, tokenizer, [*captions, ""], 6, text.options)
    torch.testing.assert_close(torch.stack([latents[i]["cond"] for i in range(8)]), expected[:8])
    torch.testing.assert_close(latents.null_cond, expected[8])

    data = ["--data", json.dumps({"source": "latents", "path": str(tmp_path / "cache")}), "--data.image_size", "16"]
    run = [*pretrained(name), *data, "--vae.name", small_vae, "--text.max_length", "6", "--text.prefix", "on "]
    with pytest.raises(ValueError, match=r"were encoded with text.hidden_layer -2, but it is -1 here: set it so"):
        train(tmp_path / "other", *run, flow=FLOW)
    with pytest.raises(ValueError, match=r"were encoded with text.prefix 'on ', but it is None here"):
        train(tmp_path / "other", *run, "--text.hidden_layer", "-2", "--text.prefix", "null", flow=FLOW)
    train(tmp_path / "run", *run, "--text.hidden_layer", "-2", "--log.eval_images", "2", flow=FLOW)
    assert "10 of the 10 captions are longer than 6 tokens" in capsys.readouterr().out
    pipe = TARFlowPipeline.from_pretrained(tmp_path / "run/pipeline")
    embeds, null = pipe.encode_prompt(prompt=captions[0], negative_prompt=None, device=torch.device("cpu"))
    torch.testing.assert_close(embeds[0], expected[0])
    torch.testing.assert_close(null[0], expected[8])


def test_captions_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    asked: list[str] = []
    whole = token_ids

    def counting(tokenizer: Any, captions: list[str], *rest: Any) -> Any:
        asked.extend(captions)
        return whole(tokenizer, captions, *rest)

    monkeypatch.setattr("tarflow.training.flow.tokens.token_ids", counting)
    tokens = CaptionTokens(tokenizer, 8)
    texts = [f"caption {number} of many" for number in range(150)]
    for captions in (texts[:3] + texts[:2], ["", texts[1], texts[5]], texts, texts[::-1]):
        found = tokens(captions)
        for ours, expected in zip(found, whole(tokenizer, captions, 8), strict=True):
            assert torch.equal(ours, expected) and ours.dtype == expected.dtype
    assert sorted(asked) == sorted(["", *texts])
    few = CaptionTokens(tokenizer, 8, most_bytes=5 * 8 * 2)
    for captions in (texts[:2], texts[2:5], texts[:2]):
        for ours, expected in zip(few(captions), whole(tokenizer, captions, 8), strict=True):
            assert torch.equal(ours, expected)
    assert len(few.places) == 2


def test_captions_that_are_no_text_are_named() -> None:
    encoder, tokenizer = make_encoder("T5EncoderModel"), make_tokenizer()
    with pytest.raises(ValueError, match=r"the caption 'caf.*' has bytes that are no text"):
        encode_captions(encoder, tokenizer, ["a cat", "caf\udce9"], 12)

"""Training a LoRA adapter of a pipeline: only it changes and is saved, resuming is bit-identical, bad input is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_runs import forked
from safetensors.torch import load_file
from trainings import CLASS_FLOW, SMALL, TEXT_FLOW
from trainings import train as train_run

from tarflow import TARFlowPipeline
from tarflow.cli.main import main
from tarflow.data.config import DataConfig
from tarflow.flows.adapters.adapters import adapter_layers
from tarflow.training.flow.accelerator import check_parallel
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.config import RunConfig
from tarflow.training.flow.lora import save_adapters
from tarflow.training.flow.lora_config import LoraConfig

FILE = Path("lora") / "pytorch_lora_weights.safetensors"
SMALL_TEXT = ["--text.kind", "small", "--text.width", "16", "--text.layers", "1"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pipelines of a few steps: of classes, with a learned denoiser and prior, and of captions."""
    folder = tmp_path_factory.mktemp("bases")
    flow = CLASS_FLOW[:-1] + ', "learned_denoiser": "conditional", "denoiser_layers": 1, "learned_prior": true}'
    train_run(folder / "classes", "--train.steps", "3", flow=flow)
    train_run(folder / "captions", *SMALL_TEXT, "--train.steps", "3", flow=TEXT_FLOW)
    return {name: str(folder / name / "pipeline") for name in ("classes", "captions")}


def train(folder: Path, base: str, *arguments: str) -> tuple[Any, dict[str, float]]:
    """A run of an adapter of rank 4, of the flow of ``base``."""
    options = ["--init_from", base, "--lora.rank", "4", "--optim.lr", "1e-2", *arguments]
    return train_run(folder, *options, flow="{}")


def test_an_adapter_is_trained_and_drawn_with(tmp_path: Path, bases: dict[str, str]) -> None:
    shown = ["--log.sample_every", "1", "--log.sample_images", "4"]
    trainer, early = train(tmp_path / "one", bases["classes"], "--train.steps", "1", *shown)
    assert (tmp_path / "one" / "samples" / "samples_00000001.png").is_file()
    trainer, late = train(
        tmp_path / "many", bases["classes"], "--train.steps", "30", "--train.more_ema_decays", "[0.5]"
    )
    assert late["latent_nats_per_dim"] < early["latent_nats_per_dim"] - 0.01
    names = {name for name, parameter in trainer.task.objective.named_parameters() if parameter.requires_grad}
    assert names and all("lora_" in name for name in names)
    assert any(name.startswith("flow.denoiser.") for name in names)
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["config.yaml", "lora", "lora_ema_0.5"]
    saved = load_file(tmp_path / "many" / FILE)
    assert len(saved) == len(names) and not any("base_layer" in name for name in saved)

    pipe = TARFlowPipeline.from_pretrained(bases["classes"])
    base = {name: value.clone() for name, value in pipe.flow.state_dict().items()}
    own = trainer.task.objective.flow.state_dict()
    for name, value in base.items():  # the flow itself, its prior included, is as it was
        linear, kind = name.rpartition(".")[::2]
        assert torch.equal(own.get(f"{linear}.base_layer.{kind}", own.get(name)), value)
    pipe.load_lora_weights(tmp_path / "many" / "lora")
    x, labels = torch.randn(2, 8, 4, 4), torch.tensor([0, 5])
    trainer.task.objective.flow.eval()
    with trainer.averages.applied():
        expected = trainer.task.objective.flow(x, class_labels=labels)
        torch.testing.assert_close(pipe.flow(x, class_labels=labels), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            pipe.flow.scaled_score(x, labels), trainer.task.objective.flow.scaled_score(x, labels)
        )
    assert "load_lora_weights" in (tmp_path / "many" / "lora" / "README.md").read_text()


def test_what_is_written_into_the_readme_stays(tmp_path: Path) -> None:
    class Pipe:
        flow = text_encoder = None

        def save_lora_weights(self, folder: Path, *_: object, **__: object) -> None:
            folder.mkdir(exist_ok=True)

    def save(rank: int, step: int) -> str:
        config = RunConfig(output="x", data=DataConfig(), init_from="base [1]", lora=LoraConfig(rank=rank))
        save_adapters(Pipe(), config, tmp_path / "lora", step)
        return (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")

    assert "of rank 4" in save(4, 2)
    text = save(8, 10)  # nothing was written into it, and its numbers are wrong
    assert "of rank 8" in text and "in 10 steps" in text
    for own in (text + "My cats.\n", text.replace("10 steps", "10 steps of cats"), ""):
        (tmp_path / "lora" / "README.md").write_text(own, encoding="utf-8")
        assert save(8, 20) == own


def test_the_text_encoder_may_have_one_too(tmp_path: Path, bases: dict[str, str]) -> None:
    base = bases["captions"]
    trainer, _ = train(tmp_path / "flow", base, *SMALL_TEXT, "--train.steps", "2")
    assert all(name.startswith("flow.") for name in load_file(tmp_path / "flow" / FILE))
    assert not adapter_layers(trainer.task.objective.text_encoder)
    options = [*SMALL_TEXT, "--lora.text_encoder", "true", "--lora.alpha", "8", "--train.steps", "3"]
    trainer, _ = train(tmp_path / "both", base, *options)
    assert {name.split(".")[0] for name in load_file(tmp_path / "both" / FILE)} == {"flow", "text_encoder"}
    pipe = TARFlowPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "both" / "lora")
    ids = torch.tensor([[5, 6, 1]])
    trainer.task.learner.model.eval()
    with trainer.averages.applied(), torch.no_grad():
        expected = trainer.task.objective.encoded(ids, torch.ones_like(ids))
        found = pipe.text_encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = TARFlowPipeline.from_pretrained(base).text_encoder(input_ids=ids).last_hidden_state
    assert (found - plain).abs().max() > 1e-4


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_resume_is_bit_identical(tmp_path: Path, bases: dict[str, str], checkpointing: str) -> None:
    options = ["--train.steps", "6", "--lora.dropout", "0.2", "--train.checkpointing", checkpointing]
    options += ["--train.accumulation", "2"]
    train(tmp_path / "parts", bases["classes"], *options, "--log.checkpoint_every", "4")
    whole = load_file(tmp_path / "parts" / FILE)
    resume = str(tmp_path / "parts" / "checkpoints" / "step_00000004")
    trainer, _ = train(tmp_path / "again", bases["classes"], *options, "--resume", resume)
    again = load_file(tmp_path / "again" / FILE)
    assert trainer.step == 6 and whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for change, words in (
        (["--lora.rank", "2"], r"lora\.rank is 4 there and 2 here"),
        (["--lora.rank", "0", "--lora.dropout", "0"], r"adapter of lora\.rank 4: set lora\.rank to that"),
    ):
        with pytest.raises(ValueError, match=words):
            train(tmp_path / "other", bases["classes"], *options, *change, "--resume", resume)


def test_a_checkpoint_of_weights_is_none_of_an_adapter(tmp_path: Path, bases: dict[str, str]) -> None:
    options = ["--init_from", bases["classes"], "--train.steps", "1", "--log.checkpoint_every", "1"]
    train_run(tmp_path / "run", *options, flow="{}")
    with pytest.raises(ValueError, match=r"is of no adapter \(lora\.rank 0\)"):
        resume = str(tmp_path / "run" / "checkpoints" / "step_00000001")
        train(tmp_path / "other", bases["classes"], "--train.steps", "2", "--resume", resume)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lora.rank", "-1"], "lora.rank must be 0"),
        (["--lora.alpha", "0"], "lora.alpha must be positive"),
        (["--lora.dropout", "1"], "lora.dropout must be in"),
        (["--lora.target_modules", "[]"], "lora.target_modules is empty"),
        (
            ["--lora.target_modules", '["qkv", "to_q"]'],
            "'to_q', but the flow's linear layers are down, proj, proj_cond",
        ),
        (["--lora.text_encoder", "true"], "lora.text_encoder is for text.kind 'small'"),
        (["--lora.dropout", "0.1", "--train.checkpointing", "reversible"], "cannot be drawn again"),
        (["--lora.rank", "0", "--lora.dropout", "0.1"], "lora.rank is 0, which is off"),
        (["--vae.train", "joint", "--train.noise_std", "0"], "'joint' do not go together"),
        (["--train.noise_std", "0.2"], "set train.noise_std to 0.3"),
        (["--data.image_size", "64"], "set data.image_size to 32"),
    ],
)
def test_bad_input(tmp_path: Path, bases: dict[str, str], arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        train(tmp_path / "run", bases["classes"], "--train.steps", "1", *arguments)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_adapter_needs_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--init_from emoji"):
        parse_config(["--data", "{}", "--output", str(tmp_path), "--lora.rank", "4"])


def test_classes_must_be_the_pipelines(tmp_path: Path, bases: dict[str, str]) -> None:
    pipe = TARFlowPipeline.from_pretrained(bases["classes"])
    pipe.register_to_config(id2label={i: f"other {i}" for i in range(pipe.flow.config.num_classes)})
    pipe.save_pretrained(tmp_path / "renamed")
    with pytest.raises(ValueError, match="other 0"):
        train(tmp_path / "run", str(tmp_path / "renamed"), "--train.steps", "1")


def test_fsdp_is_refused(bases: dict[str, str]) -> None:
    class Sharded:
        is_fsdp2 = True

    arguments = ["--data", "{}", "--output", "x", "--lora.rank", "4", "--init_from", bases["classes"]]
    config, _ = parse_config(arguments)
    with pytest.raises(ValueError, match=r"lora\.rank.*ddp\.yaml"):
        check_parallel(Sharded(), config)


def test_two_processes_train_as_one(tmp_path: Path, bases: dict[str, str]) -> None:
    options = [*SMALL, "--train.steps", "4", "--init_from", bases["classes"], "--lora.rank", "4"]
    options += ["--optim.lr", "1e-2", "--optim.denoiser_lr", "1e-2"]
    arguments = ["--data", "{}", *options, "--train.batch_size", "4", "--output", str(tmp_path / "two")]
    forked("ddp", 2, {"two": arguments}, tmp_path)
    train_run(tmp_path / "one", *options[len(SMALL) :], flow="{}")
    one, two = load_file(tmp_path / "one" / FILE), load_file(tmp_path / "two" / FILE)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_generate_takes_an_adapter(tmp_path: Path, bases: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    train(tmp_path / "run", bases["classes"], "--train.steps", "4", "--optim.denoiser_lr", "1e-2")

    def generate(name: str, *arguments: str) -> None:
        command = ["generate", "--class", "0", "--seed", "1", "--pipeline", bases["classes"]]
        main([*command, "--out", str(tmp_path / name), *arguments])

    generate("plain.png")
    generate("adapted.png", "--lora", str(tmp_path / "run" / "lora"))
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "adapted.png").read_bytes()
    with pytest.raises(SystemExit) as ended:
        generate("x.png", "--lora", str(tmp_path / "nothing"))
    assert ended.value.code == 2 and "error: cannot read adapters" in capsys.readouterr().err

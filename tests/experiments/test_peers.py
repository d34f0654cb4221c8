"""The comparison with Diffusers' DiT: its sampler, its training, and the whole in small."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fid_helpers import save_clip, tiny, write_pictures
from helpers import fresh_process
from PIL import Image
from torch import nn

from tarflow.cli.main import main
from tarflow.configs import resolve
from tarflow.data.config import DataConfig
from tarflow.data.latents import CachedLatents
from tarflow.experiments.peers import comparison, timing
from tarflow.experiments.peers.comparison import check_student, compare_peers, conditions, scores
from tarflow.experiments.peers.diffusion import DiffusionModel, matched_layers, parameters_of, sample, to_noise
from tarflow.experiments.peers.diffusion_task import make_model
from tarflow.experiments.peers.runs import Trainings
from tarflow.experiments.peers.settings import TRAINED, DiffusionConfig, PeersComparison
from tarflow.experiments.peers.timing import in_turns
from tarflow.training.flow.arguments import parse_config
from tarflow.training.loop.optimizer import hidden_matrices

SIZES: dict[str, Any] = {"cache": "c", "output": "o", "condition": "class", "width": 32, "head_dim": 16, "layers": 2}


@pytest.fixture(autouse=True)
def new_accelerators() -> None:
    """Trainings take another precision than those of tests before, in one process."""
    fresh_process()


class Straight(nn.Module):
    """Velocities of paths that are straight: what is drawn is ``data`` where there is a condition, else its negative."""

    shape = (1, 2, 2)

    def __init__(self, data: torch.Tensor, noise: torch.Tensor):
        super().__init__()
        self.data, self.noise = data, noise

    def velocity(self, x: torch.Tensor, time: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        sign = condition["class_labels"][:, None, None, None].float()
        assert time.shape == (len(x),) and 0 <= float(time.min()) <= float(time.max()) <= 1
        return self.noise.repeat(len(x) // len(self.noise), 1, 1, 1) - sign * self.data.repeat(
            len(x) // len(self.data), 1, 1, 1
        )


@pytest.mark.parametrize("steps", [1, 4])
def test_straight_paths_are_followed_there_and_back(steps: int) -> None:
    data, noise = torch.randn(2, 3, 1, 2, 2).unbind(0)
    model: Any = Straight(data, noise)
    condition, null = {"class_labels": torch.ones(3)}, {"class_labels": -torch.ones(3)}
    drawn = sample(model, noise, condition, null, 1.0, steps)
    torch.testing.assert_close(drawn, data, rtol=0, atol=1e-5)
    torch.testing.assert_close(to_noise(model, drawn, condition, steps), noise, rtol=0, atol=1e-5)
    # Guidance 2 goes as far beyond the condition as no condition is behind it.
    torch.testing.assert_close(sample(model, noise, condition, null, 2.0, steps), 3 * data, rtol=0, atol=1e-5)


def test_layers_bring_the_parameters_near() -> None:
    config = DiffusionConfig(**SIZES)
    three = DiffusionModel(dataclasses.replace(config, layers=3), 4, 4, 5)
    assert matched_layers(config, 4, 4, 5, None, parameters_of(three.transformer)) == 3
    assert matched_layers(config, 4, 4, 5, None, 1) == 1
    with pytest.raises(ValueError, match="width must be a multiple of head_dim, got 32 and 20"):
        DiffusionModel(dataclasses.replace(config, head_dim=20), 4, 4, 5)


def test_muon_takes_the_matrices_of_its_layers() -> None:
    model = DiffusionModel(DiffusionConfig(**SIZES), 4, 4, 5)
    pieces = hidden_matrices(model)
    names = {name: pieces[id(weight)] for name, weight in model.named_parameters() if id(weight) in pieces}
    assert len(names) == len(pieces) == 2 * 6
    assert names["transformer.transformer_blocks.0.attn1.to_q.weight"] == 2  # one for each head
    assert names["transformer.transformer_blocks.1.ff.net.2.weight"] == 1


def small(folder: Path, **changes: Any) -> PeersComparison:
    given: dict[str, Any] = {"pictures": 12, "held_out": 4, "num": 4, "steps": 2, "repeats": 1, "diffusion_steps": [2]}
    given |= {"guidance_scale": 2.0, "diffusion_guidance": [2.0]}
    return PeersComparison(**{"output": str(folder), "small": True, **given, **changes})


def test_a_small_comparison_and_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(tmp_path, train=["flow_muon", "student", "dit_muon"])
    rows = compare_peers(config)
    assert [row["title"] for row in rows] == ["flow, Muon", "student of the flow", "DiT, Muon, 2 steps"]
    flow, student, dit = rows
    assert flow["nats"] is not None and student["nats"] is dit["nats"] is None
    assert flow["round_trip"] < 1e-4 < dit["round_trip"]
    assert 0.5 < dit["parameters"] / flow["parameters"] < 2
    assert all(row["picture_seconds"] > 0 and row["step_seconds"] > 0 and 0 <= row["match_all"] <= 1 for row in rows)
    table = (tmp_path / "peers.md").read_text()
    assert "held-out nats" in table and "Fréchet" not in table
    assert Image.open(tmp_path / "dit_muon_2_2.png").width > 64
    saved = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert [row["key"] for row in saved] == ["flow_muon_2", "student_2", "dit_muon_2_2"]

    trainings = Trainings(config)
    recipe = trainings.recipe.optim
    assert recipe.muon_lr is not None and recipe.muon_momentum != 0.95
    adamw = parse_config(trainings.flow_arguments("flow_adamw"))[0].optim
    assert (adamw.name, adamw.lr, adamw.muon_lr) == ("adamw", recipe.lr, None)
    rates = [(one.muon_lr, one.muon_momentum) for one in map(trainings.diffusion, ("dit_muon", "dit_adamw"))]
    assert rates == [(recipe.muon_lr, recipe.muon_momentum), (None, 0.95)]  # as the flow's

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("this is there already")

    monkeypatch.setattr(comparison.Trainings, "trainer", never)
    monkeypatch.setattr(comparison, "step_seconds", lambda *_: {name: 1.0 for name in TRAINED})
    monkeypatch.setattr(comparison, "scores", never)
    again = compare_peers(config)
    assert [row["match_all"] for row in again] == [row["match_all"] for row in rows]
    with pytest.raises(ValueError, match="has a comparison with steps 2, not 3: give another folder"):
        compare_peers(dataclasses.replace(config, steps=3))
    for changes in (
        {"num": 5},
        {"remove": "a"},
        {"extractor_normalize": "half"},
    ):  # other samples and scores are made anew
        with pytest.raises(AssertionError, match="there already"):
            compare_peers(dataclasses.replace(config, **changes))


def test_a_small_one_is_small() -> None:
    config = PeersComparison(small=True)
    assert (config.steps, config.pictures, config.held_out, config.num, config.repeats) == (4, 16, 8, 8, 1)
    assert PeersComparison(small=True, num=500, caption_model="m").num == 100
    assert PeersComparison(small=True, seconds=3).steps is None and PeersComparison().steps == 2000


def test_tokens_of_captions_are_those_of_the_flow(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = (
        Path(resolve("quickstart_text"))
        .read_text()
        .replace("kind: small", "kind: small\n  unit: bpe\n  vocab_size: 70")
    )
    path.write_text(text)
    trainings = Trainings(small(tmp_path / "runs", recipe=str(path)))
    trainings.make_cache()
    trainings.matched = 1
    config = trainings.diffusion("dit_adamw")
    tokens = make_model(config, CachedLatents(config.cache, "train"))[1]
    assert tokens is not None and (config.text_unit, config.vocab_size) == ("bpe", 70)
    assert len(tokens.tokenizer) <= 70
    path.write_text(
        text.replace("kind: small", "kind: pretrained\n  name: some/encoder").replace("unit: bpe", "shard: false")
    )
    with pytest.raises(ValueError, match=r"has text\.kind 'pretrained': a DiT learns with 'small' here"):
        Trainings(small(tmp_path / "others", recipe=str(path)))


def test_by_class_and_seconds(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"condition": "class", "train": ["dit_adamw"], "diffusion_guidance": [1.0, 2.0]}
    rows = compare_peers(small(tmp_path, **changes, steps=None, seconds=0.1))
    assert [row["key"] for row in rows] == ["dit_adamw_2_1", "dit_adamw_2_2"]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    steps = json.loads((tmp_path / "steps.json").read_text())["dit_adamw"]
    assert 1 <= steps == rows[0]["steps"] == json.loads((tmp_path / "dit_adamw/trained.json").read_text())["steps"]
    table = (tmp_path / "peers.md").read_text()
    assert "| steps | seconds a step |" in table and "0.1 seconds of the processor of each" in table


def test_seconds_are_shared_out_by_steps_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[dict[str, float]] = [{"flow_muon": 0.5}, {"flow_muon": 2.0, "dit_muon": 4.0}]  # by a slower machine
    asked: list[list[str]] = []

    def spent(trainings: Trainings, names: list[str], repeats: int, seconds: Any) -> dict[str, float]:
        assert seconds is time.process_time
        asked.append(names)
        return measured[len(asked) - 1]

    monkeypatch.setattr(timing, "step_seconds", spent)
    trainings = Trainings(small(tmp_path, steps=None, seconds=20.0))
    names = ["flow_muon", "dit_muon", "flow_muon", "dit_muon"]
    assert [timing.fitting_steps(trainings, name, 20.0, 1) for name in names] == [40, 20, 40, 20]
    assert asked == [["flow_muon"], ["flow_muon", "dit_muon"]]
    trainings.fitting["flow_muon"] = 40
    assert parse_config(trainings.flow_arguments("flow_muon"))[0].train.steps == 40


def test_pictures_of_other_data_have_a_distance_and_a_caption_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = write_pictures(tmp_path / "data", 12, size=(16, 16))
    rows = [{"file_name": path.name, "text": f"word {i}"} for i, path in enumerate(sorted(pictures.iterdir()))]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(source="folder", path=str(pictures), image_size=16, validation_fraction=0.5)
    config = PeersComparison(data=data, caption_model=str(save_clip(tmp_path / "clip")), extractor="tiny", num=100)
    monkeypatch.setattr(PeersComparison, "load_extractor", lambda self, device: tiny())
    assert set(conditions(config)) <= {row["text"] for row in rows}
    drawn = [Image.open(path) for path in sorted(write_pictures(tmp_path / "drawn", 100, 1, (16, 16)).iterdir())]
    found = scores(config, drawn, [f"caption {i}" for i in range(100)], tmp_path / "samples")
    assert set(found) == {"frechet_distance", "caption_first", "caption_error"}
    assert found["frechet_distance"] > 0 and 0 <= found["caption_first"] < 0.2


def test_all_take_turns() -> None:
    called: list[str] = []
    found = in_turns({name: lambda name=name: called.append(name) for name in "ab"}, 2, 4)  # type: ignore[misc]
    assert called == list("ababab") and set(found) == {"a", "b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ["vae"]}, "train must list some of flow_muon"),
        ({"train": []}, "train is empty"),
        ({"seconds": 3.0}, r"both steps \(2\) and seconds \(3\) are given"),
        ({"steps": None, "seconds": 0.0}, "seconds must be positive, got 0"),
        ({"train": ["student"]}, "'student' without 'flow_muon'"),
        ({"diffusion_steps": [0]}, "diffusion_steps must list numbers of at least 1"),
        ({"diffusion_guidance": [0.5]}, "diffusion_guidance must list scales of at least 1"),
        ({"pictures": None}, "drawings have no end"),
        ({"data": DataConfig(source="latents", path="x")}, "data.source cannot be 'latents'"),
        ({"condition": "class", "caption_model": "m"}, "caption_model is for captions"),
        ({"recipe": "nothing"}, "there is no configuration 'nothing'"),
        ({"recipe": "drawings_class"}, "is not for the condition 'caption'"),
        ({"caption_model": "m"}, "chooses among 100 captions, but there are 4"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_peers(small(tmp_path, **changes))


def test_a_student_of_weaker_guidance_is_told_of_at_once(tmp_path: Path) -> None:
    path = tmp_path / "student/pipeline/student/config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"max_guidance_scale": 4.0}))
    check_student(PeersComparison(output=str(tmp_path), guidance_scale=4.0))
    check_student(PeersComparison(output=str(tmp_path), guidance_scale=6.0, train=["flow_muon"]))
    with pytest.raises(ValueError, match=r"guidance_scale is 6, but the student in .* was trained with scales up to 4"):
        check_student(PeersComparison(output=str(tmp_path), guidance_scale=6.0))


def test_rows_are_measured_without_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def conditions_without_gradients(config: PeersComparison) -> list[Any]:
        raise RuntimeError(f"gradients: {torch.is_grad_enabled()}")

    monkeypatch.setattr(comparison, "conditions", conditions_without_gradients)
    with pytest.raises(RuntimeError, match="gradients: False"):
        compare_peers(PeersComparison(output=str(tmp_path)))


def test_the_command_refuses_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare-peers", "--train", "[gan]"])
    assert ended.value.code == 2 and "train must list some of" in capsys.readouterr().err

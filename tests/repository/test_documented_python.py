"""Python of README, docs and cards, copied out of them, runs in a small form, in the order of the text.

What a document takes for granted is in `given`; names that open pipelines open tiny ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from documented import TEXTS
from helpers import ROOT
from PIL import Image
from pipelines import make_pipeline
from students import with_student

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.flows.likelihood import flow_loss
from tarflow.vae.codec import load_autoencoder

#: Smaller numbers, and what they stand for.
SMALLER = {
    'conditioning="prefix", cond_dim=16)': 'conditioning="prefix", cond_dim=16, layers_per_block=(1, 1), width=32, head_dim=32)',
    "steps=50": "steps=2",
    "steps=8": "steps=2",
    "best_of(32": "best_of(2",
    "num_inference_steps=10": "num_inference_steps=2",
    "num_inference_steps=30": "num_inference_steps=2",
}
#: Blocks that cannot run here: what is in them, and why.
CANNOT = {"Qwen/": "the Hub: test_text.py encodes with small models"}
SIDE = 32


def blocks(file: Path) -> list[str]:
    """A document's blocks of Python that can run here."""
    found = re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for block in found if not any(what in block for what in CANNOT)]


FILES = [file for file in TEXTS if blocks(file)]


def tiny(name: str) -> TARFlowPipeline:
    """A pipeline of the kind that a name in the documents stands for."""
    pipe = make_pipeline("class_prefix" if "class" in name else "prefix")
    if pipe.config.id2label:
        pipe.register_to_config(id2label={0: "blue ring", 1: "red star", 2: "green cross"})
    return with_student(pipe) if name.startswith("drawings") else pipe  # as they ship


def given(name: str) -> dict[str, Any]:
    """What a document's code takes for granted."""
    if name == "conditioning.md":
        depth, x = torch.rand(2, 1, 8, 8), torch.randn(2, 8, 8, 8)
        numbers = {"depth": depth, "x": x, "sigma": 0.3, "mean": [0.0] * 8, "std": [1.0] * 8}
        own = {"TARFlowModel": TARFlowModel, "TARFlowPipeline": TARFlowPipeline, "flow_loss": flow_loss}
        return {**numbers, **own, "torch": torch, "vae": load_autoencoder("drawings_emoji_f8c8")}
    if name == "exact_flow.md":
        mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        mask[:, SIDE // 2 :] = True
        return {"mask": mask, "first": Image.new("RGB", (SIDE, SIDE)), "second": Image.new("RGB", (SIDE, SIDE), "red")}
    if name == "sampling.md":
        pipe = make_pipeline("prefix", noise_levels=(0.02, 0.5), noise_conditioning=True)
        return {"pipe": pipe, "prompt": "a ring", "EDMDPMSolverMultistepScheduler": EDMDPMSolverMultistepScheduler}
    return {"TARFlowPipeline": TARFlowPipeline}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_python_of_a_document_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(TARFlowPipeline, "from_pretrained", tiny)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (SIDE, SIDE), "blue").save("ring.png")
    names = given(file.name)
    for block in blocks(file):
        for what, smaller in SMALLER.items():
            block = block.replace(what, smaller)
        exec(block, names)  # noqa: S102 (the project's own documents)
    made = [value for name, value in names.items() if name in ("image", "picture", "images", "pictures")]
    assert made or file.name == "conditioning.md"
    for one in (picture for value in made for picture in (value if isinstance(value, list) else [value])):
        assert isinstance(one, Image.Image) and one.size == (SIDE, SIDE)


def test_smaller_numbers_and_reasons_stand_for_something() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in TEXTS)
    assert [what for what in (*SMALLER, *CANNOT) if what not in text] == []
    assert len(FILES) > 6

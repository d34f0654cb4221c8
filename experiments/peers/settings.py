"""Settings of the comparison of peers, and of the training of those that are no flow."""

# Annotations are types here, not texts: those who inherit the settings need not have the types' names.
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tarflow.common.checks import AtLeastOne, Fraction, Positive, at_least, check_ranges
from tarflow.data.config import DataConfig
from tarflow.evaluation.features.settings import OptionalExtractor
from tarflow.evaluation.samples.settings import GuidanceScale
from tarflow.training.loop.network_config import NetworkConfig

#: What is trained: our flow and its student, and Diffusers' DiT by flow matching; with the optimizers of each.
TRAINED = ("flow_muon", "flow_adamw", "student", "dit_muon", "dit_adamw")

#: Of each training, unless seconds decide.
STEPS = 2000
#: The most of a small comparison; with a caption model it has 100 samples, whose captions that chooses from.
SMALL = {"steps": 4, "pictures": 16, "held_out": 8, "num": 8, "repeats": 1}


@dataclass(frozen=True, kw_only=True)
class PeersComparison(OptionalExtractor):
    """What to compare.

    Attributes:
        output: folder of the runs, ``rows.jsonl``, ``peers.md``, ``peers.json`` and grids. What is there of the same
            settings is not made again.
        data: the pictures, with captions or classes.
        condition: what is drawn from: "caption" or "class".
        recipe: configuration of the flow (a shipped name or a file), whose size all others get, and whose learning rate,
            batch and averages. Null takes the quick start's.
        train: some of "flow_muon" and "flow_adamw" (the optimizer of the published models), "student" (of flow_muon),
            "dit_muon" and "dit_adamw".
        steps: of each training, 2000 unless there are ``seconds``.
        seconds: of the processor, of all its threads together, that each training may take for its steps, instead of
            ``steps``. They are timed in turns with those of the first training, before each one.
        pictures: of the cache of latents, to train on, from the first on; null takes all, which drawings have not.
        held_out: held-out pictures of the cache, likewise; a Fréchet distance is to as many.
        num: samples of each row; held-out captions or classes in turn, of drawings all combinations.
        guidance_scale: of the flow and its student, which learns scales up to 4 or this one.
        diffusion_steps: of the sampler (`FlowMatchEulerDiscreteScheduler`), a row each.
        diffusion_guidance: the scales, a row each.
        repeats: turns in which rows are timed, after a first one; the medians count.
        extractor: of a Fréchet distance to the held-out pictures; null leaves it out.
        caption_model: folder of ``tarflow train-captions``, for a caption score; null leaves it out.
        remove: what is left out of captions for it, a regular expression.
        small: tiny models, and at most `SMALL` of these numbers, to see that it runs.
        seed: of weights, batches and samples.
    """

    output: str = "runs/peers"
    data: DataConfig = field(default_factory=DataConfig)
    condition: Literal["caption", "class"] = "caption"
    recipe: str | None = None
    train: list[str] = field(default_factory=lambda: list(TRAINED))
    steps: AtLeastOne | None = None
    seconds: Positive | None = None
    pictures: AtLeastOne | None = 16000
    held_out: AtLeastOne | None = 256
    num: Annotated[int, at_least(2)] = 216
    guidance_scale: GuidanceScale = 3.0
    diffusion_steps: list[int] = field(default_factory=lambda: [50, 10, 4])
    diffusion_guidance: list[float] = field(default_factory=lambda: [3.0])
    repeats: AtLeastOne = 3
    extractor: str | None = None
    caption_model: str | None = None
    remove: str | None = None
    small: bool = False
    seed: Annotated[int, at_least(0)] = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.steps is not None and self.seconds is not None:
            raise ValueError(
                f"both steps ({self.steps}) and seconds ({self.seconds:g}) are given: leave one of them out"
            )
        if self.seconds is None and self.steps is None:
            object.__setattr__(self, "steps", STEPS)
        if unknown := [name for name in self.train if name not in TRAINED]:
            raise ValueError(f"train must list some of {', '.join(TRAINED)}, got {unknown[0]!r}")
        if not self.train:
            raise ValueError(f"train is empty: list some of {', '.join(TRAINED)}")
        if "student" in self.train and "flow_muon" not in self.train:
            raise ValueError("train has 'student' without 'flow_muon', which it learns from: add that")
        if not self.diffusion_steps or min(self.diffusion_steps) < 1:
            raise ValueError(f"diffusion_steps must list numbers of at least 1, got {self.diffusion_steps}")
        if not self.diffusion_guidance or min(self.diffusion_guidance) < 1:
            raise ValueError(f"diffusion_guidance must list scales of at least 1 (off), got {self.diffusion_guidance}")
        if self.data.source == "latents":
            raise ValueError(
                "data.source cannot be 'latents': the comparison makes its own cache, and a student needs pictures"
            )
        if self.data.is_stream:
            raise ValueError(
                "data is a stream, but the comparison takes pictures by number and makes a cache of its own: name a folder, an "
                "archive, or a data set without data.streaming"
            )
        if self.data.source == "drawings" and (self.pictures is None or self.held_out is None):
            raise ValueError("drawings have no end: pictures and held_out must be numbers")
        if self.caption_model is not None and self.condition != "caption":
            raise ValueError("caption_model is for captions, but the condition is 'class'")
        for name, most in SMALL.items() if self.small else ():
            if name == "steps" and self.seconds is not None:
                continue
            most = 100 if name == "num" and self.caption_model is not None else most
            object.__setattr__(self, name, min(getattr(self, name) or most, most))  # null takes all


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(NetworkConfig):
    """A DiT of Diffusers, trained by flow matching on a cache of latents.

    Attributes:
        cache: folder of the latents.
        output: folder of the run; the trained model is ``model`` in it.
        condition: "caption" or "class".
        width: numbers of a token in the Transformer.
        head_dim: numbers of one of its attention heads.
        layers: of the Transformer.
        text_unit: what a token of the small text encoder that learns along is, see `TextConfig`.
        vocab_size: of that encoder's tokenizer.
        vocab_captions: how many captions the tokenizer is made of.
        text_width: numbers of a token in the text encoder.
        text_layers: of the text encoder.
        text_heads: of its attention.
        max_length: captions are padded or cut to this many tokens.
        drop_rate: share of pictures that are learned without their condition.
    """

    cache: str
    output: str
    condition: Literal["caption", "class"]
    width: AtLeastOne
    head_dim: AtLeastOne
    layers: AtLeastOne
    text_unit: Literal["word", "bpe"] = "word"
    vocab_size: AtLeastOne = 4000
    vocab_captions: AtLeastOne = 4000
    text_width: AtLeastOne = 64
    text_layers: AtLeastOne = 2
    text_heads: AtLeastOne = 4
    max_length: AtLeastOne = 16
    drop_rate: Fraction = 0.1

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser()

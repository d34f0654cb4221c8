"""Settings of the comparisons, and of pictures of what an exact flow can do."""

# Annotations are types here, not texts: those who inherit the settings need not have the types' names.
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tarflow.common.checks import AtLeastOne, Positive, at_least, check, check_ranges
from tarflow.data.config import DataConfig
from tarflow.evaluation.features.settings import OptionalExtractor, RequiredExtractor
from tarflow.evaluation.samples.settings import GuidanceScale, SampleSubjects, Seed, Split
from tarflow.pipeline.call.choices import FlowDecodingName


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(OptionalExtractor, SampleSubjects):
    """What to compare.

    Attributes:
        captions: of the samples, as of ``tarflow evaluate fid gen``; None are the data's.
        extractor: of features, see ``tarflow evaluate fid``; None leaves the distance out.
        data: pictures to reconstruct, captions, and the reference of the distance if ``ref`` does not give one.
        out: folder for comparison.json, comparison.md, samples.png and reconstructions.png.
        split: of the data.
        pictures: so many of the split are encoded, get the training noise, and are decoded by each method.
        num: samples; the flow draws each once.
        ref: what samples are compared with: a folder that ``tarflow evaluate fid ref`` wrote, or pictures; None takes the
            data's split (of endless drawings the first ``num``).
        decoding: how the flow is inverted, as at a pipeline's call.
        batch_size: samples and pictures at once.
        repeats: of the clock's measurements, of which the medians count; methods take turns.
        columns: samples in the pictures.
    """

    data: DataConfig
    out: str
    split: Split = "validation"
    pictures: AtLeastOne = 256
    num: AtLeastOne = 1000
    ref: str | None = None
    decoding: FlowDecodingName = "sequential"
    batch_size: AtLeastOne = 64
    repeats: AtLeastOne = 5
    columns: AtLeastOne = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extractor is None and (self.extractor_weights is not None or self.ref is not None):
            raise ValueError("extractor_weights and ref are for a distance, but extractor is null")


@dataclass(frozen=True, kw_only=True)
class StudentComparisonConfig(SampleSubjects):
    """What to compare, of a pipeline with a student.

    Attributes:
        guidance_scale: None is the pipeline's own, or the student's largest if that is smaller.
        out: folder for student.json, student.md and samples.png.
        data: whose captions are taken, if the model takes some and ``captions`` does not name others.
        split: of that data.
        batch_sizes: images at once, each timed.
        decoding: of the flow, to compare with.
        student_dtype: of the student's weights.
        compile: compile the student, and the flow's sequential step, see `TARFlowPipeline.enable_fast_decoding`.
        repeats: of the clock's measurements, of which the medians count; the two take turns.
        num: samples whose errors are measured.
        columns: so many of these samples are shown.
    """

    out: str
    data: DataConfig | None = None
    split: Split = "validation"
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    decoding: FlowDecodingName = "sequential"
    student_dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    repeats: AtLeastOne = 7
    num: AtLeastOne = 64
    columns: AtLeastOne = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must list numbers of at least 1, got {self.batch_sizes}")


@dataclass(frozen=True, kw_only=True)
class LevelComparisonConfig(RequiredExtractor):
    """What to train and compare.

    Attributes:
        out: folder for the trainings, noise_levels.json, noise_levels.md and grids.
        train: the configuration of all trainings: a YAML file, or a shipped one's name.
        options: more of its settings, as on the command line of `tarflow train`.
        minutes: that each training takes; None is as long as the configuration says, for both alike.
        highest: noise levels that samples are drawn at; for each a flow of this level, and one of all up to it.
        low: the lowest level of the latter.
        steps: of those flows' samples down from level to level.
        num: samples for each row.
        batch_size: samples at once.
        guidance_scale: of the samples; None is the configuration's.
        captions: of the samples, as of ``tarflow evaluate fid gen``; None takes the pipeline's examples.
        labels: of the samples, likewise; None is all classes in turn.
        ref: what they are compared with: a folder that ``tarflow evaluate fid ref`` wrote, or pictures.
        match: measure the shares of drawings that are what their caption or class says.
        columns: samples in the grids.
        seed: of the samples.
    """

    out: str
    train: str = "pixels_class"
    options: list[str] = field(default_factory=list)
    minutes: Positive | None = 20.0
    highest: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7])
    low: Positive = 0.01
    steps: list[int] = field(default_factory=lambda: [1, 4, 10, 30])
    num: AtLeastOne = 1000
    batch_size: AtLeastOne = 64
    guidance_scale: GuidanceScale | None = None
    captions: str | None = None
    labels: int | str | None = None
    ref: str | None = None
    match: bool = False
    columns: AtLeastOne = 12
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        check(
            bool(self.highest) and min(self.highest) > self.low,
            f"highest must list levels above low, {self.low:g}, got {self.highest}",
        )
        check(bool(self.steps) and min(self.steps) >= 1, f"steps must list numbers of at least 1, got {self.steps}")
        check(self.match or self.ref is not None, "nothing is measured: give ref (pictures), or match for drawings")


@dataclass(frozen=True, kw_only=True)
class ExactFlowConfig:
    """What to make.

    Attributes:
        pipeline: folder, shipped name or hub id.
        tool: "encode", "likelihood", "interpolate", "vary", "inpaint", "swap", "temperature", "best_of" or "ood".
        out: the PNG file.
        data: the pictures.
        split: "train" or "validation".
        outside: pictures of another kind, for "ood".
        num: how many pictures; of "best_of", how many are drawn.
        steps: of "inpaint", of its chain.
        step_size: of "inpaint", how much of the noise each step draws anew, above 0 and at most 1.
        seed: of all that is random.
    """

    pipeline: str
    tool: Literal["encode", "likelihood", "interpolate", "vary", "inpaint", "swap", "temperature", "best_of", "ood"]
    out: str
    data: DataConfig = field(default_factory=DataConfig)
    split: Literal["train", "validation"] = "validation"
    outside: DataConfig | None = None
    num: Annotated[int, at_least(2)] = 6
    steps: AtLeastOne = 50
    step_size: Positive = 0.3
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        usual = {"steps": type(self).steps, "step_size": type(self).step_size}
        for name, value in usual.items():
            if self.tool != "inpaint" and getattr(self, name) != value:
                raise ValueError(
                    f"{name} is for the tool 'inpaint', and has no effect with {self.tool!r}: leave it out"
                )
        if self.tool == "ood" and self.outside is None:
            raise ValueError("the tool 'ood' needs pictures of another kind: give --outside.source and --outside.path")

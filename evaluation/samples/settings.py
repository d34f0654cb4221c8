"""Settings that all have that draw samples of a pipeline to show or measure them."""

# Annotations are types here, not texts: those who inherit the settings need not have the types' names.
import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from tarflow.common.checks import AtLeastOne, Positive, Range, check, check_ranges
from tarflow.data.config import DataConfig
from tarflow.flows.decoding.names import DEFAULT_TOLERANCE
from tarflow.pipeline.call.choices import Decoder, DecodingName, Denoise, Walk

Split = Literal["train", "validation"]
GuidanceScale = Annotated[float, Range(lambda number: 1 <= number < math.inf, "at least 1 (off)")]
#: Of torch's generators, whose seeds of pictures grow with their numbers.
Seed = Annotated[int, Range(lambda number: 0 <= number < 2**32, "from 0 to 4,294,967,295")]
NoiseStd = Annotated[float, Range(lambda number: 0 <= number < math.inf, "0 or positive")]


@dataclass(frozen=True, kw_only=True)
class SampleSubjects:
    """What samples are drawn of.

    Attributes:
        pipeline: folder, shipped name or hub id.
        captions: of models that take captions: a file with one per line, or ``.jsonl`` with "text" in each; "drawings"
            (one for each of their 108 combinations), or "data". With too few the first ones come again. None takes the
            data's, if some is given, or else the examples in the pipeline's folder.
        labels: of class-conditional models: "balanced" (all classes in turn; also None), "data" (drawn by
            frequency), or one label for all by index or name.
        guidance_scale: 1 is off; None is the pipeline's own.
        seed: image i depends on it and on i. Seeds 0 to 4,293 share no noise up to a million images.
    """

    pipeline: str
    captions: str | None = None
    labels: int | str | None = None
    guidance_scale: GuidanceScale | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SampleSubjects):
    """How samples are drawn.

    Attributes:
        denoise: how the training noise is removed before decoding, see `TARFlowPipeline`; None is the pipeline's way.
        decoder: what decodes, which may remove the noise itself; None is the pipeline's own.
        noise_std: standard deviation σ that denoising takes for the training noise; None is the pipeline's own.
        num_inference_steps: of flows of many noise levels, in how many steps the noise is removed; of trajectory
            models, in how many they draw. None is the pipeline's own number.
        noise_level: of flows of many noise levels, the level to draw at; None is the highest.
        walk: of two such steps and more: "ode", Euler's, or "sde", with fresh noise at each level; None is the pipeline's
            scheduler.
        temperature: factor on the prior noise; None is the pipeline's own.
        decoding: how blocks are inverted, as at a pipeline's call; "sequential" is exact to rounding; "student" is one
            pass of the pipeline's student.
    """

    denoise: Denoise | None = None
    decoder: Decoder | None = None
    noise_std: NoiseStd | None = None
    num_inference_steps: AtLeastOne | None = None
    noise_level: Positive | None = None
    walk: Walk | None = None
    temperature: Annotated[float, Range(lambda number: 0 < number < math.inf, "positive")] | None = None
    decoding: DecodingName = "sequential"

    def sample_settings(self) -> dict[str, Any]:
        """These settings alone, by name, of a class that has others too."""
        return {field.name: getattr(self, field.name) for field in fields(SampleSettings)}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SampleSettings):
    """What to generate.

    Attributes:
        out: folder for the images; several machines need one that they share.
        num: how many images.
        batch_size: images that are drawn at once.
        format: "png", or "npz": uint8 ``arr_0`` (N, H, W, 3) and for classes int64 ``arr_1`` (N,), as of ADM.
        label_counts: frequencies for labels "data", one for each class.
        data: pictures whose frequencies of labels or whose captions "data" means.
        split: of that data.
        tolerance: of the decodings that have one, as at a pipeline's call.
        dtype: of the weights.
        fast: compile the sequential decode step, see `TARFlowPipeline.enable_fast_decoding`.
    """

    out: str
    num: AtLeastOne = 50_000
    batch_size: AtLeastOne = 64
    format: Literal["png", "npz"] = "png"
    label_counts: list[float] | None = None
    data: DataConfig | None = None
    split: Split = "train"
    tolerance: Positive = DEFAULT_TOLERANCE
    dtype: Literal["float32", "bfloat16"] = "float32"
    fast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.format in ("png", "npz"), f"format must be 'png' or 'npz', got {self.format!r}")

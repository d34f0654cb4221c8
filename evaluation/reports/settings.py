"""Settings of reports and sweeps."""

# Annotations are types here, not texts: those who inherit the settings need not have the types' names.
import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tarflow.common.checks import AtLeastOne, at_least, check, check_ranges
from tarflow.data.config import DataConfig
from tarflow.evaluation.features.names import INCEPTION, Metric, check_metrics, results_of
from tarflow.evaluation.features.settings import OptionalExtractor, RequiredExtractor
from tarflow.evaluation.samples.settings import GenerationConfig, SampleSettings
from tarflow.pipeline.call.choices import Decoder, DecodingName, Denoise

#: Of each sample so many training pictures are shown.
NEIGHBOURS = 3
SWEPT = ("guidance_scale", "denoise", "decoder", "noise_std", "decoding", "num_inference_steps", "temperature")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(OptionalExtractor, SampleSettings):
    """What to report on.

    Attributes:
        captions: of the samples, as of ``tarflow evaluate fid gen``; None takes those of held-out pictures (of training
            ones without).
        data: the pictures that it was trained on; its image_size must be the model's.
        out: the HTML file.
        title: of the page; None takes the pipeline's name.
        samples: how many images are drawn and shown.
        batch_size: images at once.
        train_images: how many training pictures are searched for neighbours; they lie evenly in the split.
        yardstick_images: held-out pictures, and training pictures, whose own neighbours tell what distances mean.
        shown_neighbours: of so many samples, those nearest to a training picture.
        likelihood_images: of each split; 0 leaves likelihoods out.
        draws: of noise for each picture's likelihood.
        extractor: of features for neighbours, see ``tarflow evaluate fid``; None searches by pixels only.
        run: a training's folder, whose TensorBoard logs give curves.
        metrics: a JSON file that ``tarflow evaluate fid calc`` wrote.
    """

    data: DataConfig
    out: str = "report.html"
    title: str | None = None
    samples: AtLeastOne = 36
    batch_size: AtLeastOne = 36
    train_images: Annotated[int, at_least(NEIGHBOURS + 1)] = 10_000
    yardstick_images: Annotated[int, at_least(2)] = 256
    shown_neighbours: AtLeastOne = 12
    likelihood_images: Annotated[int, at_least(0)] = 256
    draws: AtLeastOne = 1
    extractor: str | None = None
    run: str | None = None
    metrics: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extractor is None and self.extractor_weights is not None:
            raise ValueError("extractor_weights are given, but no extractor")
        if Path(self.out).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"out must be the name of an .html file, got {self.out!r}")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(RequiredExtractor):
    """What to sweep over, and how to judge.

    Attributes:
        gen: what all rows share; ``gen.out`` is the sweep's folder. Its swept settings have an effect where no list is
            given. Every combination of the lists is a row.
        guidance_scale: list of scales; 1 is off.
        denoise: list of ways to remove the noise before decoding.
        decoder: list of what decodes; "finetuned", which takes noisy latents, is combined with no ``denoise`` but
            false.
        noise_std: list of σ that denoising takes for the training noise; rows without denoising have none.
        decoding: list of ways to invert the blocks.
        num_inference_steps: list of steps from noise level to noise level; rows without denoising have none.
        temperature: list of factors on the prior noise.
        ref: what samples are compared with: a folder that ``tarflow evaluate fid ref`` wrote, or pictures.
        metrics: see ``tarflow evaluate fid calc``.
        match: measure the shares of drawings that are what their caption or class says.
        batch_size: pictures per pass of the extractor.
        rank: the metric by which the best row is found; None takes the first, and of match shares "match_all".
        keep_images: False removes a row's images when it is measured.
    """

    gen: GenerationConfig
    guidance_scale: list[float] | None = None
    denoise: list[Denoise] | None = None
    decoder: list[Decoder] | None = None
    noise_std: list[float] | None = None
    decoding: list[DecodingName] | None = None
    num_inference_steps: list[int] | None = None
    temperature: list[float] | None = None
    ref: str | None = None
    metrics: list[Metric] = field(default_factory=lambda: ["frechet"])
    match: bool = False
    batch_size: AtLeastOne = 64
    rank: str | None = None
    keep_images: bool = True

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in SWEPT:
            if getattr(self, name) == []:
                raise ValueError(f"{name} is an empty list: give at least one value, or leave it out")
        if self.ref is None and not self.match:
            raise ValueError("nothing is measured: give ref (pictures or their statistics), or match for drawings")
        if self.ref is not None:
            check_metrics(self.metrics, self.extractor)
            check(self.gen.num >= 2, "gen.num is 1, but the metrics need at least 2 samples")
        for values in self.combinations():
            dataclasses.replace(self.gen, **values)  # a number out of range fails here, not hours later
        if self.rank is not None and self.rank not in (names := self.results()):
            raise ValueError(f"rank is {self.rank!r}, but the metrics are {', '.join(names)}")

    def results(self) -> list[str]:
        """Names of the metrics of a row."""
        is_fid = self.extractor == INCEPTION
        wanted = [] if self.ref is None else self.metrics
        shares = [f"match_{what}" for what in ("shape", "colour", "background", "all")] if self.match else []
        return [*itertools.chain.from_iterable(results_of(metric, is_fid) for metric in wanted), *shares]

    def combinations(self) -> list[dict[str, Any]]:
        """The swept settings of each row.

        Raises:
            ValueError: if there is none.
        """
        lists = [getattr(self, name) or [getattr(self.gen, name)] for name in SWEPT]
        rows = [dict(zip(SWEPT, values, strict=True)) for values in itertools.product(*lists)]
        same = {"score": True, "none": False}  # names of the same
        rows = [{**row, "denoise": same.get(row["denoise"], row["denoise"])} for row in rows]
        rows = unique([row for row in rows if not (row["denoise"] and row["decoder"] == "finetuned")])
        if not rows:
            raise ValueError("no row is left: the finetuned decoder takes noisy latents, so give denoise [false] too")
        return rows


def unique(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without repetitions, in order; True and 1.0 are not the same."""
    return list({json.dumps(row, sort_keys=True): row for row in rows}.values())

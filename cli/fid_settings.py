"""Settings of `tarflow evaluate fid`, a class for each of its steps."""

# Annotations are types here, not texts: those who inherit the settings need not have the types' names.
import dataclasses
from typing import TYPE_CHECKING, Annotated

from tarflow.common.checks import AtLeastOne, at_least, check_ranges
from tarflow.data.config import DataConfig
from tarflow.evaluation.features.names import INCEPTION, KEPT_FEATURES, Metric, check_metrics
from tarflow.evaluation.features.settings import RequiredExtractor
from tarflow.evaluation.samples.settings import GenerationConfig, Split

if TYPE_CHECKING:
    import torch

    from tarflow.evaluation.features.extractors import Extractor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractorConfig(RequiredExtractor):
    """Which features pictures are compared by.

    Attributes:
        inception_weights: torch-fidelity's file of Inception's weights; without it they are downloaded.
        batch_size: pictures per pass and process.
    """

    inception_weights: str | None = None
    batch_size: AtLeastOne = 64

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.inception_weights and self.extractor != INCEPTION:
            raise ValueError(f"inception_weights are given, but the extractor is {self.extractor!r}")
        if self.extractor_weights and self.inception_weights:
            raise ValueError("give Inception's weights once: inception_weights or extractor_weights")

    def load_extractor(self, device: "str | torch.device") -> "Extractor":
        from tarflow.evaluation.features.extractors import load_extractor  # imported here: it takes seconds

        weights = self.inception_weights or self.extractor_weights
        return load_extractor(self.extractor, weights, device, self.extractor_normalize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceConfig(ExtractorConfig):
    """What samples are compared with.

    Attributes:
        data: a folder, zip archive or .npz of pictures; or a data section (``--data.source …``).
        split: "train" or "validation"; None takes all pictures of a path, or a data section's training split.
        image_size: side to which the pictures of a path are resized and cropped; None wants pictures of one size.
        num: the first so many pictures; None takes all. Drawings, which have no end, need it.
        keep_features: of how many pictures, lying evenly in the set, features are kept for all metrics but the Fréchet
            distance.
    """

    data: str | DataConfig
    split: Split | None = None
    image_size: AtLeastOne | None = None
    num: Annotated[int, at_least(2)] | None = None
    keep_features: Annotated[int, at_least(0)] = KEPT_FEATURES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig(ExtractorConfig):
    """What to compute.

    Attributes:
        metrics: of "frechet", "kernel" (KID), "precision_recall" and "inception_score"; None takes all that there are.
        clip: folder or hub id of a CLIP model; adds the CLIP score of the samples' captions.
        match: add the shares of drawings that are what their caption or class says.
        out: JSON file of the result; None writes ``metrics.json`` into the samples' folder.
    """

    metrics: list[Metric] | None = None
    clip: str | None = None
    match: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metrics(self.metrics, self.extractor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefConfig(ReferenceConfig):
    """Reference statistics.

    Attributes:
        out: folder to write.
    """

    out: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalcConfig(MetricsConfig):
    """Numbers of samples.

    Attributes:
        ref: a folder that ``ref`` wrote, or pictures.
        samples: a folder that ``gen`` wrote, or any other folder, zip archive or .npz of pictures.
        image_size: side to fit pictures to that are not of one size.
        cache_dir: keep statistics of pictures there, and take them from there.
    """

    ref: str
    samples: str
    image_size: AtLeastOne | None = None
    cache_dir: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(ReferenceConfig, MetricsConfig):
    """All three.

    Attributes:
        stats: folder for the reference statistics, which are reused.
        gen: what to generate; unfinished folders are continued. Captions and labels of data are those of ``data``, if that
            is a section and ``gen.data`` is not given.
    """

    stats: str
    gen: GenerationConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.data, DataConfig) and self.gen.data is None:
            split = self.gen.split if self.split is None else self.split
            object.__setattr__(self, "gen", dataclasses.replace(self.gen, data=self.data, split=split))
        if self.gen.num < 2:
            raise ValueError(f"gen.num is {self.gen.num}, but the metrics need at least 2 samples")

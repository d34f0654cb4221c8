"""Settings of what compares pictures by their features: which extractor, with which weights."""

# Annotations are types here, not texts: those who inherit the settings need not have the types' names.
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tarflow.evaluation.features.names import INCEPTION, Normalize

if TYPE_CHECKING:
    import torch

    from tarflow.evaluation.features.extractors import Extractor


@dataclass(frozen=True, kw_only=True)
class OptionalExtractor:
    """Which features pictures are compared by, if any.

    Attributes:
        extractor: "inception", whose Fréchet distance is FID; "dinov2" or "clip"; a classifier of Torchvision such as
            "mobilenet_v2"; or the path or hub id of a Transformers vision model. Null compares by none.
        extractor_weights: a file of weights (.safetensors or .pth); of "dinov2" and "clip" a Transformers folder or id.
        extractor_normalize: of pixels for Torchvision's classifiers: "imagenet", or "half" for [−1, 1].
    """

    extractor: str | None = INCEPTION
    extractor_weights: str | None = None
    extractor_normalize: Normalize = "imagenet"

    def load_extractor(self, device: "str | torch.device") -> "Extractor | None":
        """The extractor, on a device; None if none is wanted.

        Raises:
            ValueError: if it cannot be loaded.
        """
        if self.extractor is None:
            return None
        from tarflow.evaluation.features.extractors import load_extractor  # imported here: it takes seconds

        return load_extractor(self.extractor, self.extractor_weights, device, self.extractor_normalize)


@dataclass(frozen=True, kw_only=True)
class RequiredExtractor(OptionalExtractor):
    """Which features pictures are compared by.

    Attributes:
        extractor: "inception", whose Fréchet distance is FID; "dinov2" or "clip"; a classifier of Torchvision such as
            "mobilenet_v2"; or the path or hub id of a Transformers vision model.
    """

    extractor: str = INCEPTION

    def load_extractor(self, device: "str | torch.device") -> "Extractor":
        from tarflow.evaluation.features.extractors import load_extractor  # imported here: it takes seconds

        return load_extractor(self.extractor, self.extractor_weights, device, self.extractor_normalize)

"""Extractors: what turns pictures into the features whose distributions are compared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tarflow.common.dtypes import exact_convolutions
from tarflow.evaluation.features.backbones import (
    Backbone,
    first_line,
    load_weights,
    torchvision_backbone,
    transformers_backbone,
)
from tarflow.evaluation.features.names import INCEPTION, Normalize

#: Extractors that are a model of Transformers at ``weights``.
TRANSFORMERS = ("dinov2", "clip")


class Extractor:
    """Features of pictures by a network, and what identifies it.

    Args:
        name: for messages and metrics.
        network: uint8 (B, 3, H, W) → (B, D).
        preprocessing, library: in words; with the weights they decide whether features can be compared.
        device: where it runs.
        head: of Inception, the weights (classes, D) of its classifier, which the Inception Score needs.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        preprocessing: str,
        library: str,
        device: str | torch.device = "cpu",
        head: Tensor | None = None,
    ):
        self.name, self.head, self.device = name, head, torch.device(device)
        self.description = {
            "name": name,
            "weights": hash_weights(network),
            "preprocessing": preprocessing,
            "library": library,
        }
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.dims = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]

    @property
    def is_fid(self) -> bool:
        """Whether a Fréchet distance of these features is what everyone calls FID."""
        return self.name == INCEPTION

    @property
    def metric_name(self) -> str:
        return "FID" if self.is_fid else f"Fréchet distance ({self.name})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of name, weights, preprocessing and library."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) float32 of uint8 pictures (B, 3, H, W), on the extractor's device."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 pictures (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        with exact_convolutions():
            features = self.network(images.to(self.device))
        return features.float()


def load_extractor(
    name: str = INCEPTION,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    normalize: Normalize = "imagenet",
) -> Extractor:
    """An extractor by name.

    Args:
        name: "inception" (torch-fidelity's, whose Fréchet distance is FID), "dinov2" or "clip" (a Transformers model
            at ``weights``), the path or hub id of another vision model of Transformers, or a classifier of Torchvision.
        weights: a file of weights, or a folder or hub id for Transformers. Inception's are downloaded without it.
        device: where to run it.
        normalize: of pixels for Torchvision's classifiers: "imagenet", or "half" for [−1, 1].

    Raises:
        ValueError: in one sentence, if the name is unknown or the weights are missing, broken or of another network.
    """
    if name == INCEPTION:
        return inception(weights, device)
    path = weights if name in TRANSFORMERS else name
    if path is None:
        raise ValueError(
            f"the extractor {name!r} needs its weights: give --extractor-weights the folder or hub id of a "
            "Transformers model"
        )
    if name in TRANSFORMERS or "/" in name or Path(name).is_dir():
        backbone: Backbone = transformers_backbone(path)
        library = f"transformers {importlib.metadata.version('transformers')}"
        name = name if name in TRANSFORMERS else Path(name).name
    else:
        backbone = torchvision_backbone(name, weights, normalize)
        library = f"torchvision {importlib.metadata.version('torchvision')}"
    return Extractor(name, backbone, backbone.preprocessing, library, device)


class FirstOutput(nn.Module):
    """The only tensor of the tuple that torch-fidelity's extractors return."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def inception(weights: str | None = None, device: str | torch.device = "cpu") -> Extractor:
    """torch-fidelity's InceptionV3 of the published FID, 2048 features; weights by file or its own download.

    Raises:
        ValueError: if torch-fidelity is not installed, there is no network, or the weights are others.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError("torch-fidelity is not installed: pip install 'tarflow[evaluation]'") from error

    def build(path: str | None) -> Any:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)

    if weights is None:
        try:
            network = build(None)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"Inception's weights cannot be downloaded ({first_line(error)}): no network? give --inception-weights PATH"
            ) from error
    else:
        # torch-fidelity unpickles what it is given, which can run code; so it gets tensors that were read safely.
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/weights.pth"
            torch.save(load_weights(weights), path)
            try:
                network = build(path)
            except RuntimeError as error:
                raise ValueError(
                    f"{weights!r} are not torch-fidelity's weights of Inception: {first_line(error)}"
                ) from error
    version = importlib.metadata.version("torch-fidelity")
    preprocessing = "bilinear to 299 as TensorFlow 1 does it, [−1, 1]"
    return Extractor(
        INCEPTION, FirstOutput(network), preprocessing, f"torch-fidelity {version}", device, network.fc.weight
    )


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers by name, the same whatever file they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Differences between pictures as a trained network sees them."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from tarflow.evaluation.features.backbones import first_line, torchvision_backbone
from tarflow.evaluation.features.names import Normalize
from tarflow.training.losses.config import LPIPS, PerceptualConfig

#: Where a Torchvision network's features are taken if not said otherwise: the last ones of each resolution.
LAYERS: dict[str, tuple[str, ...]] = {
    "mobilenet_v2": ("features.1", "features.3", "features.6", "features.13", "features.17"),
    "vgg16": ("features.3", "features.8", "features.15", "features.22", "features.29"),
    "vgg19": ("features.3", "features.8", "features.17", "features.26", "features.35"),
    "alexnet": ("features.1", "features.4", "features.7", "features.9", "features.11"),
    **{name: ("relu", "layer1", "layer2", "layer3", "layer4") for name in ("resnet18", "resnet34", "resnet50")},
}


class PerceptualLoss(nn.Module):
    """Mean squared difference of a frozen network's features, over layers of several resolutions.

    At every position a layer's features are scaled to length one, as Zhang et al. (2018, arXiv:1801.03924) do; the
    squared lengths of the differences, between 0 and 4, are averaged over positions, pictures and layers.

    Args:
        network: a classifier of Torchvision, or "lpips".
        weights: a ``.safetensors`` or ``.pth`` file of its state dict; None for "lpips".
        normalize: of pixels, as the weights want it: "imagenet", or "half" for [−1, 1].
        layers: names of modules whose outputs (B, C, h, w) are compared; None takes `LAYERS`.
        setting: what the user calls these names.

    Raises:
        ValueError: for an unknown network or layer, weights that do not fit, or a missing package.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: str,
        weights: str | None,
        normalize: Normalize = "imagenet",
        layers: list[str] | None = None,
        setting: str = "layers",
    ):
        super().__init__()
        self.name = network
        if network == LPIPS:
            self.lpips = load_lpips()
        else:
            from torchvision.models.feature_extraction import create_feature_extractor

            names = default_layers(network, setting) if layers is None else layers
            backbone = torchvision_backbone(network, weights, normalize)
            for module in backbone.network.modules():
                if hasattr(module, "inplace"):  # it would change the features before they are compared
                    setattr(module, "inplace", False)  # noqa: B010 (which not all modules have)
            try:
                self.features = create_feature_extractor(backbone.network.eval(), list(names))
            except ValueError as error:
                raise ValueError(f"{network} has not all of the layers {list(names)}: {first_line(error)}") from error
            for name in ("mean", "std"):
                self.register_buffer(name, backbone.get_buffer(name))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Without effect: it stays as it is for evaluation."""
        return super().train(False)

    def forward(self, decoded: Tensor, images: Tensor) -> Tensor:
        """The loss, a number; ``decoded`` and ``images`` are (B, 3, H, W) in [−1, 1]. No gradient reaches the network
        or ``images``."""
        images = images.detach()
        if self.name == LPIPS:
            return self.lpips(decoded, images).mean()
        with torch.no_grad():
            wanted = self.features(self.normalized(images))
        found = self.features(self.normalized(decoded))
        return torch.stack([unit_difference(found[name], wanted[name]) for name in wanted]).mean()

    def normalized(self, images: Tensor) -> Tensor:
        """Pictures in [−1, 1] as the network wants them."""
        return ((images + 1) / 2 - self.mean) / self.std

    def check_size(self, size: int) -> None:
        """An error if the network cannot compare pictures of ``size`` × ``size`` pixels."""
        device = next(self.buffers()).device
        picture = torch.zeros(1, 3, size, size, device=device)
        try:
            with torch.no_grad():
                self(picture, picture)
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            raise ValueError(
                f"the perceptual network {self.name} cannot compare pictures of {size} pixels: {first_line(error)}"
            ) from error


def make_perceptual(config: PerceptualConfig) -> PerceptualLoss | None:
    """The loss, None if its weight is 0."""
    if config.perceptual == 0:
        return None
    return PerceptualLoss(
        config.perceptual_network,
        config.perceptual_weights,
        config.perceptual_normalize,
        config.perceptual_layers,
        config.full_name("perceptual_layers"),
    )


def unit_difference(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared length of the difference of features (B, C, h, w), each position's scaled to length one before."""
    if found.ndim != 4:
        raise ValueError(f"the features of a layer must be maps (B, C, h, w), got {tuple(found.shape)}")
    found, wanted = (nn.functional.normalize(x.float(), dim=1, eps=1e-6) for x in (found, wanted))
    return (found - wanted).square().sum(1).mean()


def default_layers(network: str, setting: str) -> tuple[str, ...]:
    """Layers of a Torchvision network that are compared unless ``setting`` names others."""
    import torchvision  # imported where it is needed: it takes a second

    if network not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"unknown perceptual network {network!r}: expected {LPIPS!r} or a classifier of Torchvision, such as "
            f"{', '.join(LAYERS)}"
        )
    if network not in LAYERS:
        raise ValueError(f"name the layers of {network} to compare with {setting}")
    return LAYERS[network]


def load_lpips() -> nn.Module:
    """The LPIPS distance with VGG's features, which its authors recommend for training: (B, 3, H, W) twice →
    (B, 1, 1, 1)."""
    if importlib.util.find_spec("lpips") is None:
        raise ValueError(
            "the perceptual network 'lpips' needs the package lpips: pip install lpips, or name a classifier of "
            "Torchvision and its weights"
        )
    import lpips

    try:
        return lpips.LPIPS(net="vgg", verbose=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"lpips cannot load its weights: {first_line(error)}") from error

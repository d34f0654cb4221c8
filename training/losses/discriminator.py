"""A discriminator of picture patches, and the losses that it and a decoder train with."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Adaptive weights are cut here: where the discriminator's gradient vanishes, their ratio says nothing.
LARGEST_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., 2017, arXiv:1611.07004): images (B, 3, H, W) in [−1, 1] → one logit for each of many
    overlapping patches, (B, 1, h, w); high ones say "a real picture".

    Its normalisation is over groups of each picture's own channels instead of over the batch: a batch of eight has noisy
    statistics, every process of several would have its own, and real and decoded pictures, which differ
    systematically, could be told apart by them.

    Args:
        width: channels of the first layer; they double in each of the next three.
        layers: how many halve the resolution. Three see patches of 70 × 70 pixels.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        self.layers = layers
        channels = [width * 2 ** min(number, 3) for number in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for number, (inside, outside) in enumerate(pairwise(channels), start=1):
            stride = 2 if number < layers else 1
            parts += [
                nn.Conv2d(inside, outside, 4, stride, padding=1, bias=False),
                nn.GroupNorm(8, outside),
                nn.LeakyReLU(0.2),
            ]
        self.network = nn.Sequential(*parts, nn.Conv2d(channels[-1], 1, 4, padding=1))
        self.apply(start_small)

    @property
    def least_size(self) -> int:
        """Side in pixels of the smallest pictures that leave a logit."""
        return 3 * 2**self.layers

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def start_small(module: nn.Module) -> None:
    """Initial weights of a convolution as the paper has them: normal with standard deviation 0.02."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (mean max(0, 1 − real) + mean max(0, 1 + fake)) of logits of any shape (Lim and Ye, 2017, arXiv:1705.02894)."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_decoder_loss(fake: Tensor) -> Tensor:
    """−mean of the logits of decoded pictures."""
    return -fake.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """|∇ reconstruction| / |∇ adversarial| at the decoder's last layer, without a gradient, at most 10⁴: both losses
    then pull equally hard there (Esser et al., 2021, arXiv:2012.09841, equation 7).

    Args:
        reconstruction, adversarial: losses that depend on ``last_layer``; their graphs are kept.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=LARGEST_WEIGHT).detach()

"""The loss of decoded pictures: pixels, features, discriminator."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from helpers import SHARED
from safetensors.torch import load_file, save_file
from torch import nn

from tarflow.training.losses.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_decoder_loss,
    hinge_discriminator_loss,
)
from tarflow.training.losses.perceptual import LAYERS, PerceptualLoss
from tarflow.training.losses.pictures import PictureLoss, PictureLossConfig

DISCRIMINATOR: dict[str, Any] = {"adversarial": 0.5, "discriminator_width": 8, "discriminator_layers": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights of MobileNetV2, in a file."""
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.safetensors"
    torch.manual_seed(1)
    save_file(torchvision.models.mobilenet_v2().state_dict(), path)
    return str(path)


def images(batch: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, side, side) * 2 - 1


class TestPixels:
    def test_is_the_weighted_sum(self) -> None:
        decoded, original = images(), images()
        loss, parts = PictureLoss(PictureLossConfig(l1=2.0, l2=3.0))(decoded, original, nn.Parameter(torch.ones(1)), 0)
        l1, l2 = (decoded - original).abs().mean(), (decoded - original).square().mean()
        assert float(loss) == pytest.approx(float(2 * l1 + 3 * l2))
        assert {name: float(part) for name, part in parts.items()} == pytest.approx({"l1": float(l1), "l2": float(l2)})


class TestPerceptual:
    def test_zero_for_equal_pictures_and_else_positive(self, weights: str) -> None:
        loss, original = PerceptualLoss("mobilenet_v2", weights), images()
        assert float(loss(original, original)) == 0
        assert 0 < float(loss(images(), original)) < 4

    def test_gradient_reaches_decoded_alone(self, weights: str) -> None:
        loss = PerceptualLoss("mobilenet_v2", weights).train()
        decoded, original = images().requires_grad_(), images().requires_grad_()
        before = {name: value.clone() for name, value in loss.state_dict().items()}
        loss(decoded, original).backward()
        assert decoded.grad.abs().sum() > 0
        assert original.grad is None
        assert all(parameter.grad is None for parameter in loss.parameters())
        assert not loss.features.training
        for name, value in loss.state_dict().items():  # batch norm's statistics too
            assert torch.equal(value, before[name]), name

    @torch.no_grad()
    def test_is_what_its_definition_says(self, weights: str) -> None:
        network = torchvision.models.mobilenet_v2()
        loss = PerceptualLoss("mobilenet_v2", weights, "half", ["features.1", "features.3"])
        network.load_state_dict(load_file(weights))
        decoded, original = images(), images()
        total = 0.0
        for end in (2, 4):
            a, b = (network.eval().features[:end](x) for x in (decoded, original))
            a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
            total += float((a - b).square().sum(1).mean()) / 2
        assert float(loss(decoded, original)) == pytest.approx(total, rel=1e-4)

    @pytest.mark.parametrize("name", sorted(LAYERS))
    def test_default_layers_exist(self, name: str) -> None:
        with torch.device("meta"):
            names = dict(torchvision.models.get_model(name).named_modules())
        assert set(LAYERS[name]) <= set(names)

    def test_trained_weights(self) -> None:
        file = SHARED / "data" / "weights" / "mobilenet_v2" / "mobilenet_v2.safetensors"
        if not file.is_file():
            pytest.skip("trained weights of MobileNetV2 are not part of the repository")
        loss = PerceptualLoss("mobilenet_v2", str(file), "half")
        original = nn.functional.interpolate(images(4, 8), size=64, mode="bicubic")
        near, far = (float(loss(original + noise * torch.randn_like(original), original)) for noise in (0.02, 0.3))
        assert 0 < near < far / 2

    def test_lpips_where_it_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = PictureLossConfig(perceptual=1.0, perceptual_network="lpips")
        monkeypatch.setitem(sys.modules, "lpips", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="needs the package lpips"):
            PictureLoss(config)

        class Distance(nn.Module):  # takes and gives the shapes that the package does
            def __init__(self, net: str, verbose: bool):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(1))

            def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
                return self.weight * (first - second).square().mean((1, 2, 3), keepdim=True)

        package = ModuleType("lpips")
        package.LPIPS = Distance
        monkeypatch.setitem(sys.modules, "lpips", package)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
        loss, decoded, original = PictureLoss(config), images(), images()
        _, parts = loss(decoded, original, nn.Parameter(torch.ones(1)), 0)
        assert float(parts["perceptual"]) == pytest.approx(float((decoded - original).square().mean()))
        assert not any(parameter.requires_grad for parameter in loss.parameters())

    def test_bad_settings(self, weights: str, tmp_path: Path) -> None:
        torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "x.pth")
        for arguments, message in (
            (("no_network", weights), "unknown perceptual network 'no_network'"),
            (("mobilenet_v2", str(tmp_path / "none.pth")), "there is no file of weights"),
            (("mobilenet_v2", str(tmp_path / "x.pth")), "not those of Torchvision's mobilenet_v2"),
            (("mobilenet_v2", weights, "half", ["features.99"]), "has not all of the layers"),
            (("squeezenet1_1", str(tmp_path / "x.pth")), "name the layers of squeezenet1_1"),
        ):
            with pytest.raises(ValueError, match=message):
                PerceptualLoss(*arguments)
        with pytest.raises(ValueError, match=r"must be maps \(B, C, h, w\)"):
            PerceptualLoss("mobilenet_v2", weights, "half", ["classifier"]).check_size(32)


class TestDiscriminator:
    def test_hinge_losses(self) -> None:
        real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
        assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(0.5 * (0.25 + 0.5))
        assert float(hinge_decoder_loss(fake)) == pytest.approx(1.5)

    def test_pictures_do_not_influence_each_other(self) -> None:
        network, pictures = PatchDiscriminator(8, 2), images(4)
        torch.testing.assert_close(network(pictures)[:1], network(pictures[:1]))
        assert network(pictures).shape == (4, 1, 6, 6)
        assert not list(network.buffers())

    @pytest.mark.parametrize("layers", [1, 2, 3, 4])
    def test_smallest_pictures(self, layers: int) -> None:
        network = PatchDiscriminator(8, layers)
        assert network(images(1, network.least_size)).shape == (1, 1, 1, 1)
        loss = PictureLoss(PictureLossConfig(**{**DISCRIMINATOR, "discriminator_layers": layers}))
        loss.check_size(network.least_size)
        with pytest.raises(ValueError, match=f"too small for loss.discriminator_layers {layers}"):
            loss.check_size(network.least_size - 1)

    def test_adaptive_weight_by_hand(self) -> None:
        layer, x = nn.Parameter(torch.tensor([1.0, 2.0])), torch.tensor([3.0, 4.0])
        reconstruction, adversarial = (layer * x).sum(), 0.5 * layer.square().sum()  # gradients x and layer
        weight = adaptive_weight(reconstruction, adversarial, layer)
        assert float(weight) == pytest.approx(5 / (5**0.5 + 1e-4))
        assert not weight.requires_grad
        assert float(adaptive_weight(10 * reconstruction, (0 * layer).sum(), layer)) == 1e4  # cut
        assert layer.grad is None

    @pytest.mark.parametrize("adaptive", [True, False])
    def test_starts_late(self, adaptive: bool) -> None:
        loss = PictureLoss(PictureLossConfig(**DISCRIMINATOR, adversarial_start=3, adaptive=adaptive))
        plain = PictureLoss(PictureLossConfig())
        decoder, original = nn.Conv2d(3, 3, 1), images()
        decoded, layer = decoder(original), decoder.weight
        before, parts = loss(decoded, original, layer, 2)
        expected, _ = plain(decoded, original, layer, 2)
        torch.testing.assert_close(before, expected)
        assert parts.keys() == {"l1", "l2"}
        assert loss.discriminator_loss(decoded.detach(), original, 2) is None

        after, parts = loss(decoded, original, layer, 3)
        weight = float(parts["adaptive_weight"]) if adaptive else 1.0
        assert float(after) == pytest.approx(float(expected) + 0.5 * weight * float(parts["adversarial"]))
        logits = loss.discriminator(decoded)
        assert float(parts["adversarial"]) == pytest.approx(float(-logits.mean()), abs=1e-6)
        assert ("adaptive_weight" in parts) is adaptive

    def test_each_learns_from_its_own_loss(self) -> None:
        loss = PictureLoss(PictureLossConfig(**DISCRIMINATOR))
        decoder, original = nn.Conv2d(3, 3, 1), images()
        decoded = decoder(original)
        total, _ = loss(decoded, original, decoder.weight, 0)
        total.backward()
        assert decoder.weight.grad is not None
        assert all(parameter.grad is None for parameter in loss.discriminator.parameters())
        seen = decoder.weight.grad.clone()
        loss.discriminator_loss(decoded, original, 0).backward()
        assert all(parameter.grad is not None for parameter in loss.discriminator.parameters())
        assert torch.equal(decoder.weight.grad, seen)

    def test_it_learns_to_tell_pictures_apart(self) -> None:
        loss = PictureLoss(PictureLossConfig(**DISCRIMINATOR))
        optimizer = torch.optim.Adam(loss.discriminator.parameters(), 1e-3)
        losses = []
        for step in range(30):
            value = loss.discriminator_loss(torch.zeros(4, 3, 32, 32), images(4), step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value))
        assert losses[0] > 0.9
        assert losses[-1] < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l1": -1.0}, "loss.l1 must be 0 or positive"),
        ({"l1": 0.0, "l2": 0.0}, "nothing makes pictures like their originals"),
        ({"perceptual": 1.0}, "loss.perceptual needs weights of mobilenet_v2"),
        ({"perceptual": 1.0, "perceptual_network": "lpips", "perceptual_weights": "x"}, "not for lpips"),
        ({"perceptual_layers": []}, "loss.perceptual_layers is empty"),
        ({"discriminator_width": 12}, "must be a multiple of 8"),
        ({"discriminator_layers": 0}, "loss.discriminator_layers must be at least 1"),
        ({"discriminator_lr": 0.0}, "loss.discriminator_lr must be positive"),
    ],
)
def test_bad_configs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PictureLossConfig(**settings)

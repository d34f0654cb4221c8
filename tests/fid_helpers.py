"""Pictures and small networks for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tarflow.evaluation.features.extractors import Extractor


def write_pictures(folder: Path, count: int = 8, seed: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:05d}.png")
    return folder


class Tiny(nn.Module):
    """Features that are means of random colour mixtures: quick, and different for different pictures."""

    def __init__(self, dims: int = 4, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(dims, 3, 5, 5, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return torch.conv2d(images.float() / 255, self.weight, stride=3).relu().mean((2, 3))


def tiny(dims: int = 4, seed: int = 0) -> Extractor:
    return Extractor("tiny", Tiny(dims, seed), "none", "tests")


def save_backbone(path: Path, name: str = "squeezenet1_1") -> Path:
    import torchvision

    network = torchvision.models.get_model(name, weights=None)
    save_file(network.state_dict(), path) if path.suffix == ".safetensors" else torch.save(network.state_dict(), path)
    return path


def save_clip(folder: Path) -> Path:
    """A random CLIP model of a few numbers, with a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(tokens), "max_position_embeddings": 12}
    text |= {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    vision = small | {"image_size": 16, "patch_size": 8, "projection_dim": 6}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


class Means(nn.Module):
    """Mean colours (B, 3)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.double().mean((2, 3))

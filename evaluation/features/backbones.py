"""Networks whose features pictures are compared by: Torchvision's classifiers, and vision models of Transformers."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tarflow.evaluation.features.names import Normalize

#: Mean and standard deviation of pixels in [0, 1]: ImageNet's by colour, or what maps them to [−1, 1].
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
SIDE = 224
#: Names of a Transformers model's parameter for the token that stands for the whole picture.
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


class Backbone(nn.Module):
    """uint8 pictures (B, 3, H, W) → features (B, D): resized to ``side`` × ``side``, normalised, and put through.

    Args:
        network: gives (B, D), or a map (B, D, h, w) that is averaged.
        mean, std: of pixels in [0, 1] by colour.
        side: the pictures' side; they are resized by antialiased bicubic interpolation.
        made: how the network makes one vector of many, if that needs to be told apart.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], side: int = SIDE, made: str = ""
    ):
        super().__init__()
        self.network, self.side = network, side
        self.preprocessing = (
            f"bicubic antialiased to {side}, mean {tuple(mean)}, std {tuple(std)}{made and f', {made}'}"
        )
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()  # (B, 3, H, W)
        if tuple(x.shape[2:]) != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        features = self.network((x / 255 - self.mean) / self.std)
        return features.mean((2, 3)) if features.ndim == 4 else features


class VisionFeatures(nn.Module):
    """One vector of each picture by a Transformers model, or a map of them.

    Args:
        model: of which tokens come first those of classes, if it has such.
        pools: whether it has trained weights for what it makes of all tokens.
    """

    def __init__(self, model: nn.Module, pools: bool):
        super().__init__()
        self.model, self.pools = model, pools
        self.has_class_token = any(name.split(".")[-1] in CLASS_TOKENS for name, _ in model.named_parameters())

    @torch.no_grad()
    def made(self, side: int) -> str:
        """How tokens become one vector, unless it is the usual way, or there are none; found with a picture of this side."""
        if self.has_class_token or self.eval()(torch.zeros(1, 3, side, side)).ndim == 4:
            return ""
        return "pooled tokens" if self.pools else "mean of tokens"

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.model(pixel_values=pixels)
        if (embeddings := getattr(output, "image_embeds", None)) is not None:
            return embeddings
        hidden = output.last_hidden_state
        if hidden.ndim != 3:
            return hidden
        if self.has_class_token:
            return hidden[:, 0]
        pooled = getattr(output, "pooler_output", None) if self.pools else None
        return hidden.mean(1) if pooled is None else pooled.flatten(1)


def torchvision_backbone(name: str, weights: str | None, normalize: Normalize = "imagenet") -> Backbone:
    """A classifier of Torchvision without its last linear layer.

    Args:
        name: as ``torchvision.models.list_models`` has it.
        weights: a ``.safetensors`` or ``.pth`` file of its state dict.
        normalize: of pixels, as the weights want it.

    Raises:
        ValueError: for an unknown name or weights that are missing or do not fit.
    """
    import torchvision  # imported where it is needed: it takes a second

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(
            f"unknown extractor {name!r}: expected 'inception', 'dinov2', 'clip', a classifier of Torchvision, or the "
            f"path or hub id of a Transformers vision model{hint}"
        )
    if weights is None:
        raise ValueError(f"the extractor {name!r} needs its weights: give --extractor-weights PATH")
    network = torchvision.models.get_model(name, weights=None)
    try:
        network.load_state_dict(load_weights(weights))
    except RuntimeError as error:
        raise ValueError(
            f"the weights {weights!r} are not those of Torchvision's {name}: {first_line(error)}"
        ) from error
    linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if linear:
        network.set_submodule(linear[-1], nn.Identity())
    else:  # SqueezeNet ends with a convolution to classes and pools those
        network.classifier = nn.AdaptiveAvgPool2d(1)
    return Backbone(network, *NORMALIZATIONS[normalize])


def transformers_backbone(path: str) -> Backbone:
    """A vision model of Transformers, by folder or hub id, with the normalisation that is saved beside it.

    Features are CLIP's image embeddings, or the class token of others, which is how DINOv2 is used for distances
    (Stein et al., 2023, arXiv:2306.04675); of models without such a token what they pool of all tokens, or else the mean.

    Raises:
        ValueError: if it cannot be loaded.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

    path = local_or_hub(path)
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        loader = CLIPVisionModelWithProjection if kind.startswith("clip") else AutoModel
        model, loading = loader.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load a vision model of Transformers from {path!r}: {first_line(error)}") from error
    if missing := sorted(key for key in loading["missing_keys"] if not key.startswith("pooler.")):
        raise ValueError(f"the model in {path!r} lacks weights, which would be random: {missing[0]}")
    if model.main_input_name != "pixel_values":
        raise ValueError(f"the model in {path!r} is no vision model: it takes {model.main_input_name}")
    (mean, std), side = NORMALIZATIONS["imagenet"], SIDE
    try:
        processor = AutoImageProcessor.from_pretrained(path)
    except (OSError, KeyError):
        pass  # without a processor's settings, those of ImageNet
    else:
        mean, std = tuple(processor.image_mean or mean), tuple(processor.image_std or std)
        sizes = getattr(processor, "crop_size", None) or processor.size or {}
        side = sizes.get("height") or sizes.get("shortest_edge") or SIDE
    features = VisionFeatures(model, pools=not any(key.startswith("pooler.") for key in loading["missing_keys"]))
    return Backbone(features, mean, std, side, features.made(side))


def local_or_hub(path: str) -> str:
    """A folder, its home directory filled in, or else the hub id that the path may be.

    Raises:
        ValueError: if it is neither, so that nothing is looked for in the network.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ValueError(f"there is no folder {path!r}")
    return path


def load_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a pickled one if it holds nothing else; in float32.

    Raises:
        ValueError: if it does not exist, is cut off, or would run code when opened.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no file of weights {path!r}")
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle can raise anything
        raise ValueError(f"{path!r} is no whole file of nothing but weights: {first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path!r} is no state dict: expected tensors by name")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def first_line(error: Exception) -> str:
    """The first line that says something, cut where it gets long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[1 if len(lines) > 1 and lines[0].startswith("Error(s)") else 0] if lines else type(error).__name__
    return line if len(line) <= 160 else f"{line[:160]}…"

"""An autoencoder that several shipped pipelines have, and one ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, ModelMixin  # noqa: F401 (Diffusers loads classes of modules that have ModelMixin)

from tarflow.models import followed


class SharedAutoencoder(AutoencoderKL):
    """A placeholder in a shipped pipeline's ``model_index.json``. Loading gives an ordinary ``AutoencoderKL``, from the
    folder that `tarflow.models.followed` finds."""

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As of Diffusers, of the folder that has the weights."""
        return AutoencoderKL.load_config(followed(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> AutoencoderKL:
        """As of Diffusers, of the folder that has the weights."""
        return AutoencoderKL.from_pretrained(followed(pretrained_model_name_or_path), **kwargs)

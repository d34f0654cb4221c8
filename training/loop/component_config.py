"""Settings that the trainings of a pipeline's further components share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tarflow.common.checks import AtLeastOne
from tarflow.data.config import DataConfig
from tarflow.training.loop.network_config import NetworkConfig


@dataclass(frozen=True, kw_only=True)
class ComponentConfig(NetworkConfig):
    """How a further component of a pipeline is trained.

    Attributes:
        pipeline: folder, shipped name or hub id.
        data: the pictures, of the model's size.
        output: folder of the run: resolved settings, logs, grids, checkpoints. None is ``runs/NAME_`` and what is
            trained, with the name of the pipeline's folder, or of the folder above if it is called "pipeline".
        save_to: folder of the pipeline with the component. None puts the component into the pipeline's own folder.
        sample_posterior: noise on draws from the autoencoder's posterior, or else on its means: as the flow was trained
            (``vae.sample_posterior`` there). None is the former, but for pipelines whose autoencoder was trained along: of
            its posterior the noise is all.
        mixed_precision: "no" or "bf16".
        grid_images: pictures in the grid of each evaluation.
    """

    #: What is trained, in names of folders.
    kind: ClassVar[str]

    pipeline: str
    data: DataConfig
    output: str | None = None
    save_to: str | None = None
    sample_posterior: bool | None = None
    mixed_precision: Literal["no", "bf16"] = "bf16"
    grid_images: AtLeastOne = 8

    @property
    def folder(self) -> Path:
        """Of the run."""
        if self.output is not None:
            return Path(self.output).expanduser()
        path = Path(self.pipeline).expanduser()
        name = path.parent.name if path.name == "pipeline" and path.parent.name else path.name
        return Path("runs") / f"{name}_{self.kind}"

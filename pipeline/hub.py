"""Pipelines from and to folders and the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from huggingface_hub import snapshot_download

from tarflow.models import resolve
from tarflow.pipeline.folder import written_beside


class PipelineFiles:
    """How `TARFlowPipeline` is loaded and saved."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a pipeline: a shipped one by its name (`tarflow.models.shipped`), a folder, or a hub id."""
        return super().from_pretrained(resolve(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch a pipeline from the Hub; Diffusers' own way refuses components of other libraries."""
        known = ("revision", "cache_dir", "token", "local_files_only", "force_download")
        return snapshot_download(pretrained_model_name, **{key: kwargs[key] for key in known if key in kwargs})

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save beside the place and move there, so that the folder is whole or as before.

        Raises:
            OSError: if writing fails, for example on a full disk.
        """
        with written_beside(Path(save_directory)) as temporary:
            super().save_pretrained(temporary, *args, **kwargs)

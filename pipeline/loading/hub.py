"""Pipelines from and to folders and the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, list_repo_files, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn

from tarflow.common.dtypes import kept_default_dtype
from tarflow.common.files import write_json
from tarflow.flows.layers.prepared import check_saved_whole
from tarflow.models import HUB_ID, resolve
from tarflow.pipeline.loading.folder import usual_rights, written_into
from tarflow.pipeline.loading.place import INDEX, locate
from tarflow.pipeline.loading.weight_files import WeightFile, weight_file
from tarflow.vae import shared, taef2  # noqa: F401 (Diffusers loads components of modules that are imported already)

#: By this file in a pipeline's folder `diffusers.DiffusionPipeline` finds the class, which is not one of its own.
MODULE = "pipeline"
MODULE_TEXT = """# For diffusers.DiffusionPipeline.from_pretrained(…, trust_remote_code=True); needs the package tarflow.
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline  # noqa: F401
"""
#: Files at the top of a repository that belong to a pipeline.
TOP_LEVEL = (".json", ".md", ".py", ".txt")

#: Endings of weights that are not read here.
OTHER_WEIGHTS = ("msgpack", "h5", "onnx", "pb", "ckpt", "pt", "pth", "gguf")


class PipelineFiles(DiffusionPipeline):
    """How `TARFlowPipeline` is loaded and saved."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a pipeline: a shipped one by its name (`tarflow.models.shipped`), a folder, or a hub id.

        Raises:
            ValueError: if weights are missing, or for a name that is none of these.
        """
        found = resolve(pretrained_model_name_or_path)
        if not Path(found).exists() and not HUB_ID.fullmatch(found):
            found = locate(found)  # a folder below ~, or an error that says what there is
        with kept_default_dtype():
            pipe = super().from_pretrained(found, **kwargs)
        for name, part in pipe.components.items():
            missing = missing_tensors(part) if isinstance(part, nn.Module) else []
            if missing:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                raise ValueError(
                    f"the {name} of {str(pretrained_model_name_or_path)!r} lacks the tensors "
                    f"{', '.join(missing[:3])}{more}: its files are damaged or of another model; save or fetch it again"
                )
        return pipe

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Diffusers, but the class is always this one: a folder names it by a file of its own, for Diffusers."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch a pipeline from the Hub; Diffusers' own way refuses components of other libraries.

        Args:
            variant, use_safetensors: as of `from_pretrained`; only weights that it would read are fetched.
            revision, cache_dir, token, local_files_only, force_download: as of `huggingface_hub.snapshot_download`.
            kwargs: components that the caller has, by name, which are not fetched.

        Returns:
            the local folder.

        Raises:
            ValueError: if the repository has no such weights.
        """
        known = ("revision", "cache_dir", "token", "local_files_only", "force_download")
        options = {key: kwargs[key] for key in known if kwargs.get(key) is not None}
        if options.get("local_files_only"):
            return snapshot_download(pretrained_model_name, **options)
        listing = {key: options[key] for key in ("revision", "token") if key in options}
        try:
            names = list_repo_files(pretrained_model_name, **listing)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception as error:  # noqa: BLE001 (offline, or the Hub does not answer: what was fetched before will do)
            try:
                return snapshot_download(pretrained_model_name, **{**options, "local_files_only": True})
            except LocalEntryNotFoundError:
                raise error from None
        components = [name for name in cls._get_signature_keys(cls)[0] if name not in kwargs]
        patterns = files_to_fetch(names, components, kwargs.get("variant"), kwargs.get("use_safetensors"))
        return snapshot_download(pretrained_model_name, allow_patterns=patterns, **options)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as Diffusers does, file by file; see `written_into` for what happens to other files.

        Args:
            save_directory: the folder.
            safe_serialization, variant, max_shard_size: as of Diffusers.
            push_to_hub: also upload the folder; with Diffusers' ``repo_id`` (the folder's name if not given), ``token``,
                ``private``, ``create_pr`` and ``commit_message``. A README.md that is there is the card.

        Raises:
            OSError: if writing fails, for example on a full disk; then the folder is as before.
            ValueError: if weights of a part are on a disk, or kept by Accelerate's hooks.
        """
        for part in self.components.values():
            if isinstance(part, nn.Module):
                check_saved_whole(part)
        hub = {key: kwargs.pop(key, None) for key in ("repo_id", "token", "private", "create_pr", "commit_message")}
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        with written_into(save_directory) as temporary:
            super().save_pretrained(temporary, **options, **kwargs)
            name_class(temporary, Path(save_directory).expanduser())
            usual_rights(temporary)
        if push_to_hub:
            self._push(Path(save_directory).expanduser().resolve(), **hub)

    def _push(
        self,
        folder: Path,
        repo_id: str | None,
        token: str | None,
        private: bool | None,
        create_pr: bool | None,
        commit_message: str | None,
    ) -> None:
        """Upload a saved folder."""
        repo_id = create_repo(repo_id or folder.name, exist_ok=True, private=private, token=token).repo_id
        if not (folder / "README.md").exists():
            card = load_or_create_model_card(repo_id, token=token, is_pipeline=True)
            populate_model_card(card).save(folder / "README.md")
        self._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=bool(create_pr))


def missing_tensors(module: nn.Module) -> list[str]:
    """Parameters and buffers that a module has no values of, nor a hook that would bring them."""
    missing = []
    for prefix, part in module.named_modules():
        if getattr(part, "_hf_hook", None) is None:
            named = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            missing += [f"{prefix}.{name}" if prefix else name for name, value in named if value.device.type == "meta"]
    return missing


def name_class(folder: Path, target: Path) -> None:
    """Write `MODULE` beside a saved pipeline's index and name it there, so that `diffusers.DiffusionPipeline` can load
    the folder. Other people's classes, and another file of that name in ``target``, are left alone."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    file = target / f"{MODULE}.py"
    if index["_class_name"] != "TARFlowPipeline" or (file.exists() and file.read_text(encoding="utf-8") != MODULE_TEXT):
        return
    (folder / file.name).write_text(MODULE_TEXT, encoding="utf-8")
    write_json(folder / INDEX, {**index, "_class_name": [MODULE, index["_class_name"]]})


def files_to_fetch(
    names: list[str], components: list[str], variant: str | None = None, use_safetensors: bool | None = None
) -> list[str]:
    """Files of a repository that loading a pipeline reads, and its texts: of each component one set of weights.

    Args:
        names: of all files.
        components: folders to look into.
        variant: of the weights; components that have none of it are taken as they are.
        use_safetensors: True takes these alone, False never, None the others where there are none.

    Raises:
        ValueError: if no component has the variant, or one has no weights of the format.
    """
    chosen, variants = [], set()
    for component in components:
        inside = [name for name in names if name.split("/")[0] == component and "/" in name]
        weights = {name: file for name in inside if (file := weight_file(name.rsplit("/", 1)[1])) is not None}
        variants |= {file.variant for file in weights.values()}
        chosen += [name for name in inside if name not in weights and name.rsplit(".", 1)[-1] not in OTHER_WEIGHTS]
        chosen += weights_to_fetch(component, weights, variant, use_safetensors)
    if variant is not None and variant not in variants:
        others = ", ".join(sorted(repr(one) for one in variants if one is not None)) or "none"
        raise ValueError(f"there are no weights of the variant {variant!r}; variants are: {others}")
    return sorted(chosen) + [
        name for name in names if "/" not in name and (name.endswith(TOP_LEVEL) or "." not in name)
    ]


def weights_to_fetch(
    component: str, weights: dict[str, WeightFile], variant: str | None, use_safetensors: bool | None
) -> list[str]:
    """The weight files of one component that loading it reads, see `files_to_fetch`."""
    if not weights:
        return []
    own = variant if variant in {file.variant for file in weights.values()} else None
    formats = {file.format for file in weights.values() if file.variant == own}
    wanted = (
        "bin"
        if use_safetensors is False or (use_safetensors is None and "safetensors" not in formats)
        else "safetensors"
    )
    if wanted not in formats:
        raise ValueError(
            f"the component {component!r} has no weights in the format {wanted!r}"
            + ("" if own is None else f" of the variant {own!r}")
            + ": load with another use_safetensors or variant"
        )
    return [name for name, file in weights.items() if (file.variant, file.format) == (own, wanted)]

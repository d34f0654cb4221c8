"""Pipeline folders on disk: replaced as a whole, and given further components."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tarflow.models import resolve

INDEX = "model_index.json"


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends; after an error ``target`` is as
    before.

    Raises:
        OSError: for any error inside, such as a full disk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = target.with_name(target.name + ".tmp"), target.with_name(target.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write {str(target)!r}: {error}") from error
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def own_folder(pipeline: str, save_to: str | None) -> Path:
    """The folder that a changed pipeline is written to: ``save_to``, or the pipeline's own.

    Raises:
        ValueError: if the pipeline is no folder of the user's, and no other is given; or if ``save_to`` is there and
            no pipeline, as it is replaced.
    """
    if save_to is not None:
        target = Path(save_to).expanduser()
        if target.exists() and not (target / INDEX).is_file():
            raise ValueError(f"save_to would replace {save_to!r}, which is no pipeline folder: name a new one")
        return target
    folder = Path(pipeline).expanduser()
    if str(resolve(pipeline)) != str(pipeline) or not (folder / INDEX).is_file():
        raise ValueError(
            f"{pipeline!r} is no pipeline folder that could be changed, but a shipped pipeline or one from the Hub: say "
            "where to save the new one with --save_to FOLDER"
        )
    return folder


def add_component(source: Path, target: Path, name: str, component: Any, **settings: Any) -> None:
    """Make ``target`` what the pipeline folder ``source`` is, with a further component; they may be the same.

    All other files are the very same, whatever their format, README.md and calibrations included.

    Args:
        name: of the component in the pipeline, and of its folder.
        component: a model with Diffusers' ``save_pretrained``.
        settings: of the pipeline's configuration, which are changed.

    Raises:
        OSError: if writing fails; then ``target`` is as before.
    """
    in_place = target.exists() and target.resolve() == source.resolve()
    with written_beside(target) as temporary:
        # In place the old names vanish: links need no second copy of the weights, which may be large.
        shutil.copytree(source, temporary, copy_function=link_or_copy if in_place else shutil.copy2)
        shutil.rmtree(temporary / name, ignore_errors=True)
        component.save_pretrained(temporary / name)
        index = json.loads((temporary / INDEX).read_text(encoding="utf-8"))
        index |= {name: [type(component).__module__, type(component).__name__], **settings}
        (temporary / INDEX).unlink()  # the old one may be the same file
        (temporary / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def link_or_copy(source: str, target: str) -> None:
    """A second name of a file, or a copy where the file system has no such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

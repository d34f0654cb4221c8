"""Pipeline folders on disk: written file by file, and given further components."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from tarflow.common.files import write_json
from tarflow.models import followed, resolve
from tarflow.pipeline.loading.place import INDEX
from tarflow.pipeline.loading.weight_files import superseded

#: Means of held-out pictures, which training writes and the web page shows.
HELD_OUT = "held_out.json"
#: What may be in a folder that is otherwise empty: on a new disk, or in a new repository.
HARMLESS = ("README.md", "LICENSE", "lost+found")
#: Of files that are not in their place yet; one that nothing was written to for an hour was left by a killed process.
TEMPORARY = ".tarflow-saving-"
LEFT_OVER_SECONDS = 3600


@contextmanager
def written_into(target: str | Path) -> Iterator[Path]:
    """A temporary folder whose files go to ``target`` when the block ends, one by one, `INDEX` last.

    Other files of ``target`` stay as they are, but for weights that would be read with or instead of the new ones
    (`superseded`), which are removed. ``target`` is made if it is not there; it may be a link, a mount point, the current
    folder, or in a folder that cannot be written to. After an error it is as before.

    Raises:
        OSError: for files that cannot be written, for example on a full disk; and what the block raises.
    """
    place = Path(os.path.realpath(Path(target).expanduser()))
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    temporary = place / f"{TEMPORARY}{secrets.token_hex(4)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        remove_left_over(place)
        temporary.mkdir()
        new = temporary / "new"
        new.mkdir()
        yield new
        move_files(new, place, temporary / "old")
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # a folder that holds something now stays
            for folder in made:
                folder.rmdir()
        # The libraries that write weights and tokenizers are in Rust, and have no OSError.
        if isinstance(error, Exception) and (isinstance(error, OSError) or "(os error" in str(error)):
            number = errno.ENOSPC if "(os error 28)" in str(error) else getattr(error, "errno", None)
            raise OSError(number or errno.EIO, f"cannot write {str(target)!r}: {error}") from error
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def move_files(source: Path, target: Path, old: Path) -> None:
    """Move the files below ``source`` to the same places below ``target``. Files that they replace are kept below ``old``,
    and restored after an error."""
    files = sorted(path.relative_to(source) for path in source.rglob("*") if not path.is_dir())
    files.sort(key=lambda file: file == Path(INDEX))
    done: list[tuple[Path, Path | None]] = []
    try:
        for file in files:
            place = target / file
            place.parent.mkdir(parents=True, exist_ok=True)
            done.append((place, set_aside(place, old / file)))
            move(source / file, place)
        for folder in {file.parent for file in files}:
            new = [file.name for file in files if file.parent == folder]
            for name in superseded([path.name for path in (target / folder).iterdir()], new):
                done.append((target / folder / name, set_aside(target / folder / name, old / folder / name)))
                (target / folder / name).unlink(missing_ok=True)
    except BaseException:
        for place, copy in reversed(done):
            with suppress(OSError):
                move(copy, place) if copy is not None else place.unlink(missing_ok=True)
        raise


def set_aside(file: Path, copy: Path) -> Path | None:
    """Keep a file under a second name: a hard link, or, where there are none, renamed. None if there is no such file."""
    if not os.path.lexists(file):
        return None
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, copy, follow_symlinks=False)
    except OSError:  # a file system without second names, or another one behind a link
        try:
            os.replace(file, copy)
        except OSError:
            shutil.copy2(file, copy, follow_symlinks=False)
    return copy


def move(source: Path, target: Path) -> None:
    """Rename a file, also to another file system, where a part of a pipeline may lie behind a link."""
    if target.exists() and not target.is_symlink():
        shutil.copymode(target, source)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
        try:
            shutil.copy2(source, beside, follow_symlinks=False)
            os.replace(beside, target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def usual_rights(folder: Path) -> None:
    """Give all files below a new folder the usual permissions. Safetensors makes files that only their owner can read, and
    nobody else could load a pipeline from a shared folder."""
    usual = folder / f"{TEMPORARY}rights"
    usual.touch()
    for path in folder.rglob("*"):
        if path.is_file():
            shutil.copymode(usual, path)
    usual.unlink()


def remove_left_over(folder: Path) -> None:
    """Remove temporary folders that killed processes have left."""
    for path in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            newest = max(file.stat().st_mtime for file in (path, *path.rglob("*")))
            if time.time() - newest > LEFT_OVER_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_unused(folder: Path) -> bool:
    """Whether a folder is not there, or has nothing in it but hidden files and what is `HARMLESS`."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name.startswith(".") or path.name in HARMLESS for path in folder.iterdir())


def own_folder(pipeline: str, save_to: str | None) -> Path:
    """The folder that a changed pipeline is written to: ``save_to``, or the pipeline's own.

    Raises:
        ValueError: if the pipeline is no folder of the user's, and no other is given; or if ``save_to`` is there, and
            neither a pipeline nor empty.
    """
    if save_to is not None:
        target = Path(save_to).expanduser()
        if not (is_unused(target) or (target / INDEX).is_file()):
            raise ValueError(
                f"{save_to!r}, where to save, is there and no pipeline folder: name a new or an empty folder, so that "
                "nothing in it is mixed up"
            )
        return target
    folder = Path(pipeline).expanduser()
    if str(resolve(pipeline)) != str(pipeline) or not (folder / INDEX).is_file():
        raise ValueError(
            f"{pipeline!r} is no pipeline folder that could be changed, but a shipped pipeline or one from the Hub: say "
            "where to save the new one with --save_to FOLDER"
        )
    return folder


def check_same_flow(source: Path, target: Path) -> None:
    """Whether a folder that a changed copy of the pipeline ``source`` is to be written to has no other pipeline's flow,
    which would be lost.

    Raises:
        ValueError: if it has.
    """
    if not (target / INDEX).is_file() or target.resolve() == source.resolve():
        return
    own, other = ({path.name: path for path in (folder / "flow").glob("*")} for folder in (source, target))
    same = own.keys() == other.keys() and all(filecmp.cmp(own[name], other[name], shallow=False) for name in own)
    if not same:
        raise ValueError(
            f"{str(target)!r}, where to save, is a pipeline with another flow than {str(source)!r} has, which would be "
            "replaced: name a new folder"
        )


def add_component(source: Path, target: Path, name: str, component: ModelMixin, **settings: Any) -> None:
    """Make ``target`` what the pipeline folder ``source`` is, with a further component; they may be the same.

    All files of the pipeline are the very same, whatever their format, calibrations included. What else ``source`` has,
    such as README.md, is copied where ``target`` has no such file.

    Args:
        name: of the component in the pipeline, and of its folder.
        component: a model with Diffusers' ``save_pretrained``.
        settings: of the pipeline's configuration, which are changed.

    Raises:
        OSError: if writing fails; then ``target`` is as before.
    """
    index = json.loads((source / INDEX).read_text(encoding="utf-8"))
    with written_into(target) as temporary:
        if not (target.exists() and target.resolve() == source.resolve()):
            parts = [key for key, value in index.items() if isinstance(value, list) and key != name]
            index |= copy_pipeline(source, target, temporary, parts, name)
        component.save_pretrained(temporary / name)
        usual_rights(temporary / name)
        index |= {name: [type(component).__module__, type(component).__name__], **settings}
        write_json(temporary / INDEX, dict(sorted(index.items())))


def copy_pipeline(
    source: Path, target: Path, temporary: Path, parts: list[str], without: str
) -> dict[str, tuple[str, str]]:
    """Copy the pipeline ``source`` to ``temporary``: the folders of its ``parts``, and files that ``target`` lacks.
    Hidden files and the component ``without`` are left out. A part that belongs to another shipped pipeline is
    copied from there.

    Returns:
        library and class of such parts, which the copy's index needs.
    """
    changed = {}
    for path in source.iterdir():
        if path.name.startswith(".") or path.name in (INDEX, without):
            continue
        if path.name in parts and path.is_dir():
            origin = followed(path)
            shutil.copytree(origin, temporary / path.name)
            if origin != path:
                config = json.loads((origin / "config.json").read_text(encoding="utf-8"))
                changed[path.name] = ("diffusers", config["_class_name"])
        elif not os.path.lexists(target / path.name):
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, temporary / path.name)
    return changed

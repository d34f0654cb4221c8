"""Configurations that ship with the project, as YAML files.

May import: nothing else of the project.
"""

from __future__ import annotations

from pathlib import Path

#: Each shipped configuration is a file here.
FOLDER = Path(__file__).resolve().parent


def shipped() -> tuple[str, ...]:
    """Names of the shipped configurations."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def launchers() -> tuple[str, ...]:
    """Names of the configurations of Accelerate's launcher."""
    return tuple(sorted(f"accelerate/{file.stem}" for file in (FOLDER / "accelerate").glob("*.yaml")))


def resolve(name: str) -> str:
    """The file of a configuration: the user's own, or a shipped one by its bare name or as ``configs/NAME.yaml``.

    Raises:
        ValueError: if there is neither.
    """
    if Path(name).expanduser().is_file():
        return str(Path(name).expanduser())
    bare = name.removeprefix("configs/").removesuffix(".yaml") if name.startswith("configs/") else name
    if bare not in shipped():
        raise ValueError(f"there is no configuration {name!r}: give a YAML file, or one of {', '.join(shipped())}")
    return str(FOLDER / f"{bare}.yaml")

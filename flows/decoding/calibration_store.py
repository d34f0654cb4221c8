"""Calibrations of one model, kept for later processes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor, nn

from tarflow.common.cache import cache_folder
from tarflow.common.files import write_json
from tarflow.common.tensors import dequantized
from tarflow.flows.decoding.calibration import BlockChoice, decodings
from tarflow.flows.decoding.watch import Calibration
from tarflow.flows.layers.prepared import held_tensors, offload_group

FILE_NAME = "decoding.json"
#: Raised when methods change their speed, so that what earlier versions measured is measured again.
FORMAT = 2
#: Seconds that a process waits for another one to finish writing.
PATIENCE = 5.0
#: Seconds between two looks whether it has; the library's own are longer than writing takes.
LOOK = 0.005
#: Numbers of each parameter that `sample_of_weights` takes, or up to twice as many.
SAMPLED = 8
#: Settings of models that came later, and are left out where they are off: what was kept before stays valid.
NEWER = ("noise_conditioning", "deep_order")


def fingerprint(model: Any) -> str:
    """A short name of a model's settings and weights, from a few numbers of each tensor."""
    settings = {k: v for k, v in model.config.items() if k[0] != "_" and (v or k not in NEWER)}
    digest = hashlib.sha256(json.dumps(settings, default=str).encode())
    for name, value in held_tensors(model):
        numbers = dequantized(value).flatten()[:: max(1, value.numel() // 64)][:64].float().cpu()
        digest.update(name.encode() + numbers.numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def sample_of_weights(model: nn.Module) -> bytes:
    """A few numbers of each parameter. They show in well under a millisecond for small models whether weights have
    changed, also in ways that PyTorch does not count, such as through ``.data``.

    Changes are not seen of single numbers between those, of quantized weights, and of weights that are not in memory; a
    model in groups that are brought for each use has none, as their memory may hold anything in between.
    """
    numbers: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    pending: list[nn.Module] = [model]  # `modules` takes as long as all the rest
    while pending:
        part = pending.pop()
        if "_diffusers_hook" in vars(part) and offload_group(part) is not None:
            return b""
        pending += [child for child in part._modules.values() if child is not None]
        for parameter in part._parameters.values():
            if type(parameter) is nn.Parameter and not parameter.is_meta:
                values = parameter.reshape(-1)[:: max(1, parameter.numel() // SAMPLED)]
                numbers.setdefault((parameter.device, parameter.dtype), []).append(values)
    return b"".join(torch.cat(values).float().cpu().numpy().tobytes() for values in numbers.values())


def file_of(name: str | Path | None, shared: bool = False) -> Path | None:
    """Where a pipeline's calibrations are kept: in its own folder; or in the user's cache if it has no folder here, the
    folder cannot be written to, or it is ``shared``, for example part of the installed package.

    Args:
        name: folder or hub id of the pipeline; None for one that was never saved, whose calibrations stay in memory.
    """
    if not name:
        return None
    folder = Path(name)
    if folder.is_dir() and os.access(folder, os.W_OK) and not shared:
        return folder / FILE_NAME
    known = str(folder.resolve()) if folder.is_dir() else str(name)
    return cache_folder() / "calibrations" / f"{hashlib.sha256(known.encode()).hexdigest()[:24]}.json"


class CalibrationStore:
    """Calibrations of one model, in memory and, if there is a place for it, in a file.

    A file that is damaged, of another model, or of other versions of this project or of PyTorch is not used, and is
    replaced at the next calibration. Several processes may write the same file: each adds what it found.

    Args:
        path: of the file, see `file_of`, or None.
        model_fingerprint: see `fingerprint`.
    """

    def __init__(self, path: str | Path | None, model_fingerprint: str):
        self.path = None if path is None else Path(path)
        self.head = {"format": FORMAT, "torch": torch.__version__, "model": model_fingerprint}
        self.calibrations: dict[str, Calibration] = self._read()

    @property
    def choices(self) -> dict[str, list[BlockChoice]]:
        """The choices of each kind of call."""
        return {key: calibration.choices for key, calibration in self.calibrations.items()}

    def _read(self) -> dict[str, Calibration]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if {name: content.get(name) for name in self.head} != self.head:
                return {}
            found = {}
            for key, values in content["calibrations"].items():
                choices = [BlockChoice(**choice) for choice in values["choices"]]
                decodings(choices, 1.0)  # raises for a method or segment that does not exist
                found[key] = Calibration(**{**values, "choices": choices})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return found

    def put(self, key: str, calibration: Calibration) -> None:
        """Keep and, where that is possible, write, with what other processes have written in the meantime."""
        self.calibrations[key] = calibration
        if self.path is None:
            return
        try:
            with lock(self.path):
                self.calibrations = {**self.calibrations, **self._read(), key: calibration}
                kept = {name: asdict(one) for name, one in self.calibrations.items()}
                write_json(self.path, {**self.head, "calibrations": kept})
        except OSError:  # a folder that is read-only, or a full disk: the calibration is only a convenience
            pass

    def watched(self, key: str, methods: Sequence[str]) -> Callable[[int, float], None]:
        """What takes each block's place and milliseconds in a call, and after the last one takes account of it.

        Args:
            key: of the kind of call.
            methods: by which the call inverts each block.
        """
        times: dict[int, float] = {}

        def block_took(index: int, milliseconds: float) -> None:
            times[index] = milliseconds
            calibration = self.calibrations.get(key)
            if calibration is None or len(times) < len(methods):
                return
            before = calibration.choices, calibration.settled
            calibration.record(methods, [times[i] for i in range(len(methods))])
            if calibration.stale or not calibration.settled or before != (calibration.choices, True):
                self.put(key, calibration)

        return block_took


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep other processes from writing the file; without a place for the lock, or after `PATIENCE`, go on without."""
    held = None
    try:
        folder = cache_folder() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:24]
        held = filelock.FileLock(folder / f"{name}.lock", timeout=PATIENCE)
        held.acquire(poll_interval=LOOK)
    except (OSError, filelock.Timeout, NotImplementedError):
        held = None
    try:
        yield
    finally:
        if held is not None:
            held.release()

"""How checkpoints that cannot be read are refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.constants import RNG_STATE_NAME, SCALER_NAME
from accelerate.utils.other import load
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

#: What torch (whose own is no Exception), safetensors, pickle and JSON raise for damaged files.
READING = (CheckpointException, SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError)
UNDERSTANDING = (ValueError, KeyError, IndexError, TypeError)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read a file or folder of a checkpoint.

    Raises:
        ValueError: that names it, if it is damaged, cut off or of something else.
    """
    try:
        yield
    except (torch.OutOfMemoryError, PermissionError):  # nothing is wrong with the file
        raise
    except (*READING, *UNDERSTANDING) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"the checkpoint {str(path)!r} cannot be read, it is damaged or cut off ({reason}): resume another"
        ) from error


def check_scaler(accelerator: Accelerator, checkpoint: Path) -> None:
    """Whether there is a scale of losses, which fp16 goes on with.

    Raises:
        ValueError: if the checkpoint was trained without.
    """
    if accelerator.scaler is not None and not (checkpoint / SCALER_NAME).exists():
        raise ValueError(
            f"the checkpoint {str(checkpoint)!r} was not trained with mixed_precision fp16, so it has no scale of losses "
            f"({SCALER_NAME}): set mixed_precision as it was"
        )


def check_random_states(checkpoint: Path, process: int) -> None:
    """Whether a process's random states can be read: Accelerate goes on without those that it cannot read.

    There are none of processes that the run did not have when it was saved.

    Raises:
        ValueError: that names the file, if it is damaged or cut off.
    """
    path = checkpoint / f"{RNG_STATE_NAME}_{process}.pkl"
    if process == 0 or path.exists():
        with reading(path):
            load(path)

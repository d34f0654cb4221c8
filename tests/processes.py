"""Scripts of the project in processes of their own, which have all libraries from the start: importing them takes seconds."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import sys
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from helpers import ROOT, fresh_process

#: Copies are made of a process that has all libraries and has used none of them: whatever tests did before, such as
#: starting autograd's threads or using a GPU, would end a copy of this one.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tarflow.training.flow.trainer", "tarflow.training.flow.arguments", "accelerate"])


def start_script(name: str, words: list[str], printed: Path, largest_file: int | None = None) -> BaseProcess:
    """Start a script as a terminal does, in a process group of its own.

    Args:
        name: of the file, from the top.
        words: what is typed behind it.
        printed: gets what it prints, errors too.
        largest_file: in bytes; writing more fails, as on a full disk.
    """
    process = CONTEXT.Process(target=run_script, args=(name, words, printed, largest_file))
    process.start()
    # One that goes on after a test failed would be waited for at the end of all tests.
    atexit.register(kill_group, process)
    return process


def kill_group(process: BaseProcess) -> None:
    """End a script and the processes that it started, if it runs yet."""
    if process.is_alive() and process.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run_script(name: str, words: list[str], printed: Path, largest_file: int | None) -> None:
    """What the process does."""
    os.setsid()
    fresh_process()
    torch.set_num_threads(1)
    with printed.open("w", buffering=1, encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        sys.argv = [name, *words]
        runpy.run_path(str(ROOT / name), run_name="__main__")

"""Trainings on several processes, as a launcher starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
from accelerate.commands import launch as launcher
from helpers import ROOT
from processes import CONTEXT


def by_run(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first process found in each run, with that of the others."""
    first, *others = results
    return {name: {**first[name], "others": [other[name] for other in others]} for name in first}


def launched(kind: str, processes: int, script: str, arguments: list[str]) -> None:
    """Run a script, by its path from the top, on several processes as a user starts it; it must end well."""
    config = ROOT / "configs" / "accelerate" / f"{kind}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes), "--main_process_port", "0", str(ROOT / script)]
    done = subprocess.run(
        [*command, *arguments],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def launcher_settings(kind: str, processes: int) -> dict[str, str]:
    """The environment that Accelerate's launcher makes of a file of configs/accelerate."""
    config = ROOT / "configs" / "accelerate" / f"{kind}.yaml"
    words = ["--config_file", str(config), "--num_processes", str(processes), "--main_process_port", "0", "worker.py"]
    arguments, seen = launcher.launch_command_parser().parse_args(words), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "multi_gpu_launcher", seen.append)
        launcher.launch_command(arguments)
    environment = launcher.prepare_multi_gpu_env(*seen)
    return {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": seen[0].master_port}


def work(rank: int, settings: dict[str, str], runs: dict[str, list[str]], folder: Path) -> None:
    """What a launcher has each process do."""
    os.environ |= {**settings, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    results = {name: parallel_worker.train(arguments) for name, arguments in runs.items()}
    (folder / f"result_{rank}.json").write_text(json.dumps(results))
    os._exit(0)


def forked(kind: str, processes: int, runs: dict[str, list[str]], folder: Path, killed: bool = False) -> dict[str, Any]:
    """As `launch`, of processes which need not import anything; no results if they are to be ``killed``."""
    settings = {**launcher_settings(kind, processes), "WORLD_SIZE": str(processes)}
    started = [CONTEXT.Process(target=work, args=(rank, settings, runs, folder)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()  # one that hangs would be waited for at the end of all tests
    assert codes == [-signal.SIGKILL if killed else 0] * processes
    if killed:
        return {}
    return by_run([json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(processes)])

"""Settings of small caches of latents, and two processes that write one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from tarflow.data.config import DataConfig
from tarflow.training.flow.config import VaeConfig
from tarflow.training.latent_cache.caching import Encoder, cache_latents
from tarflow.training.latent_cache.config import CacheConfig

COUNT, SHARD = 100, 10


def config_of(output: Path | str, vae_path: str, **changes: Any) -> CacheConfig:
    arguments: dict[str, Any] = {"data": DataConfig(image_size=8), "num_images": COUNT, "num_validation_images": 12}
    arguments |= {"vae": VaeConfig(name=vae_path), "shard_size": SHARD}
    return CacheConfig(output=str(output), **{**arguments, **changes})


def work(rank: int, port: int, config: CacheConfig, last: int | None) -> None:
    """One of two processes; it is killed at batch ``last``."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    PartialState._reset_state()
    torch.set_num_threads(1)
    calls, latents = [], Encoder.latents

    def breaking(self: Encoder, images: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(len(images))
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return latents(self, images)

    Encoder.latents = breaking  # type: ignore[method-assign]
    cache_latents(config)
    os._exit(0)


def run_two(config: CacheConfig, last: int | None) -> list[int | None]:
    """Exit codes of two processes that write one cache."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, port, config, last)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]

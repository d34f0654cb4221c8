"""Made-up data for the benchmark of reading: pictures as files, archives and shards, and caches of random latents."""

from __future__ import annotations

import importlib.util
import io
import json
import multiprocessing
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fsspec.config import conf
from PIL import Image
from safetensors.torch import save_file

from tarflow.data.config import DataConfig
from tarflow.data.place import MANIFEST
from tarflow.data.shards import FORMAT, checksums

CLASSES, FILES = 10, 8


def jpegs(count: int, side: int) -> list[bytes]:
    """Pictures about as hard to decode as photographs: smooth noise, enlarged."""
    rng, found = np.random.default_rng(0), list[bytes]()
    for _ in range(count):
        small = rng.integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def picture_sources(root: Path, count: int, side: int) -> dict[str, DataConfig]:
    """The same pictures in every form, written below ``root``."""
    import pyarrow
    import pyarrow.parquet

    files = {f"class{number % CLASSES}/{number:06d}.jpg": content for number, content in enumerate(jpegs(count, side))}
    for name, content in files.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(content)
    with zipfile.ZipFile(root / "pictures.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    names = list(files)
    for shard in range(FILES):
        mine = names[shard::FILES]
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for name in mine:
                member = tarfile.TarInfo(name)
                member.size = len(files[name])
                tar.addfile(member, io.BytesIO(files[name]))
        table = pyarrow.table({"image": [{"bytes": files[name], "path": None} for name in mine]})
        pyarrow.parquet.write_table(table, root / f"{shard}.parquet", row_group_size=256)
    common: dict[str, Any] = {"image_size": side, "validation_fraction": 0.0}
    table_of: dict[str, Any] = {**common, "source": "datasets", "name": "parquet", "data_files": f"{root}/*.parquet"}
    return {
        "folder": DataConfig(source="folder", path=str(root / "folder"), **common),
        "zip": DataConfig(source="folder", path=str(root / "pictures.zip"), **common),
        "parquet": DataConfig(**table_of),
        "parquet stream": DataConfig(**table_of, streaming=True),
        "tar stream": DataConfig(source="webdataset", path=f"{root}/{{0..{FILES - 1}}}.tar", **common),
    }


def random_cache(folder: Path, shards: int, size: int, shape: tuple[int, int, int]) -> int:
    """Write a cache of ``shards`` × ``size`` random latents in float16; returns the bytes of all shards."""
    generator = torch.Generator().manual_seed(0)
    records: list[dict[str, Any]] = []
    folder.mkdir(parents=True)
    for number in range(shards):
        name, values = f"train-{number:05d}.safetensors", torch.randn(size, *shape, generator=generator).half()
        tensors = {"latent_mean": values, "latent_std": values.abs(), "label": torch.arange(size) % CLASSES}
        header = {"format": FORMAT, "fingerprint": "random", "split": "train", "count": size}
        save_file(tensors, folder / name, {"cache": json.dumps(header)})
        about = {"file": name, "split": "train", "shape": list(shape[1:]), "first": number * size, "count": size}
        records.append({**about, "bytes": (folder / name).stat().st_size, **checksums(folder / name)})
    manifest = {
        "format": FORMAT,
        "fingerprint": "random",
        "flip": False,
        "has_captions": False,
        "text": None,
        "factor": 8,
        "pictures": {"train": shards * size, "validation": 0},
        "image_size": 8 * shape[1],
        "shards": records,
        "latents_mean": [0.0] * shape[0],
        "latents_std": [1.0] * shape[0],
        "class_names": list(map(str, range(CLASSES))),
        "autoencoder": {"name": "random", "hash": "random"},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return sum(record["bytes"] for record in records)


class SlowHandler(SimpleHTTPRequestHandler):
    """Serves a folder, and waits before each answer."""

    protocol_version = "HTTP/1.1"
    latency = 0.0

    def do_GET(self) -> None:
        time.sleep(self.latency)
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


def serve(folder: Path, latency: float, port: Any) -> None:
    SlowHandler.latency = latency
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowHandler, directory=str(folder)))
    port.value = server.server_address[1]
    server.serve_forever()


@contextmanager
def http_server(folder: Path, latency: float) -> Iterator[str]:
    """The URL of a folder that a process of this machine serves, each answer ``latency`` seconds late."""
    before = dict(conf)
    if importlib.util.find_spec("aiohttp") is None:
        import fsspec.implementations.http_sync  # noqa: F401 (fsspec's HTTP by requests: importing it registers it)

        conf["http"] = {"stream": True}  # or else it takes answers in pieces of 10 kB
    context = multiprocessing.get_context("fork")
    port = context.Value("i", 0)
    process = context.Process(target=serve, args=(folder, latency, port), daemon=True)
    process.start()
    try:
        while not port.value:
            if not process.is_alive():
                raise OSError("the web server of this benchmark cannot be started")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port.value}"
    finally:
        conf.clear()
        conf.update(before)
        process.terminate()
        process.join()

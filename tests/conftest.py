"""What every test shares: one thread (or TARFLOW_TEST_THREADS of them), no network, no GPU unless TARFLOW_TEST_DEVICE
names one, and the same random numbers each time."""

from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import tempfile
from collections.abc import Iterator

# Before any library reads them:
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TARFLOW_CACHE"] = CACHE = tempfile.mkdtemp(prefix="tarflow-tests-")
if os.environ.get("TARFLOW_TEST_DEVICE", "cpu") == "cpu":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}

import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ.get("TARFLOW_TEST_THREADS", "1")))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


def pytest_collection_finish() -> None:
    """What the libraries made stays; a full collection of garbage, which benchmarks ask for, need not go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Start each test from the same random state, so that it does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield

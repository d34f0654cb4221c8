"""What is freed is kept for what comes next."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from tarflow.common.memory import keep_freed_memory
print(keep_freed_memory())
for count in range(8):
    if count == 6:
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.ones(2**24) for _ in range(3)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(("environment", "keeps"), [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_pages_are_not_asked_for_again(environment: dict[str, str], keeps: bool) -> None:
    """200 MB are some 50,000 pages of 4 KB, twice."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    own |= {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=own, capture_output=True, text=True, check=True)
    answer, faults = done.stdout.split()
    assert answer == str(keeps)
    assert (int(faults) < 1000) == keeps

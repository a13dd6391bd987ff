"""Freed memory is kept: training steps take far fewer pages from the system."""

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from prune2deploy.networks import load_network
from prune2deploy.train import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
module = load_network("resnet20").module.train()
images = torch.zeros(128, 3, 32, 32)
def steps(count):
    for _ in range(count):
        module(images).sum().backward()
steps(6)  # until then the heap may grow still
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_taken(how: str) -> int:
    words = [sys.executable, "-c", CODE, how]
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ, timeout=120)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    assert pages_taken("keep") < 0.5 * pages_taken("leave")

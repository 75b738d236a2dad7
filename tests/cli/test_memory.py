"""How a process keeps memory, seen from outside: the settings last for the whole process."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from pathlib import Path
import torch
from dfs_cli.cli.memory import keep_freed_memory, return_freed_memory
def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
keep_freed_memory()
before = resident_bytes()
tensors = [torch.ones(1 << 20) for _ in range(100)]
last = torch.ones(1 << 10)
del tensors
kept = resident_bytes() - before
return_freed_memory()
print(kept, resident_bytes() - before)
"""


@pytest.mark.medium
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory as they like")
def test_freed_memory_is_kept_within_a_stage_and_returned_after_it() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, left = map(int, result.stdout.split())
    assert kept > 300 << 20 > 100 << 20 > left

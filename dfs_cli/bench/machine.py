"""What machine something was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_CPU = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, str]:
    """Processor, number of its cores, system, and versions of the runtimes."""
    facts = {"processor": _processor(), "cores": str(os.cpu_count() or 0), "system": platform.platform()}
    for package in ("torch", "onnxruntime"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    """The processor's name as Linux knows it, or else as Python does."""
    try:
        lines = _CPU.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

"""What a figure came from: processor, cores, versions."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _processor():
    """The processor's name and its widest vector instructions, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()

    def field(name):
        """The text of the first core's field, or nothing."""
        found = [line for line in lines if line.startswith(name)]
        return found[0].split(":")[1].strip() if found else ""

    model = field("model name") or platform.processor()
    flags = field("flags").split()
    for simd in ("avx512f", "avx2"):
        if simd in flags:
            return f"{model} ({simd})"
    return f"{model} ({platform.machine()})"


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


@cache
def commit():
    """The commit that the sources are at, -dirty where they differ; "" outside a clone."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"],
                               cwd=folder, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip()


def machine():
    """A dict of strings, stamped on every result."""
    import torch
    versions = {}
    for name in ("minidiff", "numpy", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x",
                 "diffusers", "jax", "mkl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": _processor(), "cores": str(cores()), "gpu": gpu,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "spin": os.environ.get("GOMP_SPINCOUNT", "default"),
            "commit": commit(), **versions}

"""The state that a machine is in when it times something: pinned, or said.

Fresh temporaries cost a peer three or four times as much where the C library gives memory
back to the system and faults it in again. So glibc is told to keep it, in favour of the
peers, before anything is timed.
"""

import ctypes
import os
import shutil
import statistics
import subprocess
import time
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
NEVER = 2**31 - 1
TUNABLES = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={NEVER}"
LOOK = .25  # seconds of looking at what others do
BUSY = .1  # of the cores' time


def pin_malloc():
    """Have freed memory kept, here and in the processes that are started; says what was
    done."""
    os.environ.setdefault("GLIBC_TUNABLES", TUNABLES)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "not pinned"
    kept = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER)
    return "keeps what is freed" if kept else "not pinned"


def others():
    """The share of all cores' time that others take, or None where that is not told."""
    try:
        before = spent()
        time.sleep(LOOK)
        after = spent()
    except OSError:
        return None
    idle, total = (b - a for a, b in zip(before, after))
    return round(1 - idle / max(total, 1), 2)


def spent():
    """(idle, all) ticks of all cores since they began."""
    line, *_ = Path("/proc/stat").read_text().splitlines()
    ticks = [*map(int, line.split()[1:9])]
    return ticks[3] + ticks[4], sum(ticks)


def cpu_mhz():
    """The median core's clock, or None."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return round(statistics.median(clocks)) if clocks else None


def gpu_mhz():
    """The GPU's clocks, its processors' and its memory's, or None."""
    if not shutil.which("nvidia-smi"):
        return None
    fields = "--query-gpu=clocks.sm,clocks.mem"
    found = subprocess.run(["nvidia-smi", fields, "--format=csv,noheader,nounits"],
                           capture_output=True, text=True)
    return found.stdout.splitlines()[0] if found.stdout else None


def clocks():
    """What the machine runs at, right after something was timed."""
    return {"cpu_mhz": cpu_mhz(), "gpu_mhz": gpu_mhz()}


@cache
def state():
    """What is stamped on every row of a run: how it was when the run began."""
    malloc, busy = pin_malloc(), others()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"malloc": malloc, "others": busy, "load": load}


def warning(found):
    """A line for a busy machine, or nothing."""
    if not found["others"] or found["others"] < BUSY:
        return []
    return [f"the machine was busy: others took {found['others']:.0%} of its cores before "
            f"the run, load {found['load']}; trust ratios and their intervals, not times"]

"""How time and peak memory grow with elements, dimensions and steps, with fitted exponents.

The op is one update with its output allocated inside, so its peak memory says what it holds:
the output alone. The loop is a whole sampler with a null network.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from ..kernels import BACKENDS, update
from .clock import clock, summary
from .rows import row_of
from .run import FORM, candidates, case, is_cuda
from .samplers import SAMPLERS, network, states

BATCH, LOOP = 4096, next(iter(SAMPLERS))
SIZES = {"elements": [1 << k for k in (20, 22, 24, 26)], "dimensions": [128, 512, 2048, 8192],
         "steps": [3, 10, 30, 100]}


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def peak_bytes(f, device="cpu"):
    """How far the process's memory rose inside f, whoever allocated; None where the system does
    not tell. On a GPU, what torch allocated."""
    if is_cuda(device):
        import torch
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        f()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _one_update(elements, width, backend, device):
    work, coef, _ = case(FORM, elements, "float32", device, width=width)
    return (lambda: update(work.u, coef, backend=backend)), work.out.shape


def _loop(steps, backend, device):
    import torch
    x = torch.randn(1024, 1024, device=device)
    net = network("null", x)

    def whole():
        for _ in states(LOOP, backend, net, x, steps):
            pass
    return whole, x.shape


def works(backend, device):
    """(against, size, op's name, (f, shape)) of every point."""
    for n in SIZES["elements"]:
        yield "elements", n, FORM.name, _one_update(n, 1024, backend, device)
    for d in SIZES["dimensions"]:
        yield "dimensions", d, FORM.name, _one_update(BATCH * d, d, backend, device)
    for n in SIZES["steps"]:
        yield "steps", n, LOOP, _loop(n, backend, device)


def peaks(backend, device):
    """peak_bytes of every point, each warm, in a process whose freed memory leaves it at once."""
    code = ("import sys, json; from minidiff.bench import growth as g; g.SIZES = json.loads("
            "sys.argv[1]); print(json.dumps([(f(), g.peak_bytes(f, sys.argv[3]))[1] "
            "for *_, (f, _) in g.works(*sys.argv[2:])]))")
    run = subprocess.run([sys.executable, "-c", code, json.dumps(SIZES), backend, str(device)],
                         env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
                         capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def bench_growth(device="cpu"):
    """Rows: size, seconds and peak_bytes against elements, dimensions (at 4096 samples) or steps
    (of 1024 samples of 1024 dimensions)."""
    backend = next(b for b in candidates(None, device) if b in BACKENDS)
    for peak, (against, size, op, (f, shape)) in zip(peaks(backend, device),
                                                     works(backend, device)):
        yield row_of(op, backend, "float32", shape, kind="growth", against=against, size=size,
                     peak_bytes=peak, **summary(clock({"": f}, device)[""]), matches_reference=True)


def exponent(rows, key):
    """b of the least-squares fit key = a size^b."""
    if any(not r[key] for r in rows):
        return float("nan")
    size, value = (np.log([r[k] for r in rows]) for k in ("size", key))
    return float(np.polyfit(size, value, 1)[0])


def show_growth(rows):
    """A line for each of elements, dimensions and steps."""
    lines = [f"{'op':<12}{'against':<12}{'range':<19}{'time ~ n^':>10}{'memory ~ n^':>12}"
             f"{'peak / output':>15}"]
    for against in dict.fromkeys(r["against"] for r in rows):
        part = [r for r in rows if r["against"] == against]
        held = [(r["peak_bytes"] or float("nan")) / (4 * r["elements"]) for r in part]
        lines.append(f"{part[0]['op']:<12}{against:<12}"
                     f"{part[0]['size']:>8} ...{part[-1]['size']:>7}"
                     f"{exponent(part, 'seconds'):>10.2f}{exponent(part, 'peak_bytes'):>12.2f}"
                     f"{min(held):>8.3f} ... {max(held):.3f}")
    return "\n".join(lines)

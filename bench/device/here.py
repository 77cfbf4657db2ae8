"""The device at hand, and what its checks and rates share."""

import numpy as np
import torch

from ...kernels import driver, missing, on_cupy, update

CUDA = torch.cuda.is_available()
NAMES = "triton", "cupy"
DEVICE = "cuda" if CUDA else "cpu"
SEED, TAG = 0x123456789ABCDEF, 2


class NotHere(Exception):
    """A part that this machine cannot run, and why."""


def on_device(*names):
    """The backends of a GPU, or NotHere."""
    if not CUDA:
        raise NotHere("no CUDA device")
    lacks = {name: missing(name) for name in names or NAMES}
    if reason := "; ".join(f"{name}: {why}" for name, why in lacks.items() if why):
        raise NotHere(reason)
    return names or NAMES


def same(a, b):
    """Whether two tensors hold the same bits."""
    bits = torch.int32 if a.element_size() == 4 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.cpu().contiguous().view(bits),
                                              b.cpu().contiguous().view(bits))


def expected(shape, coef, operands=(), **counter):
    """The oracle's update, rounded to the operands' dtype."""
    out = torch.empty(shape)
    update([u.float().cpu() for u in operands], coef, out=out, backend="numpy", **counter)
    return out.to(operands[0].dtype) if operands else out


def captured(f, calls=1):
    """A graph of calls of f, as a function; f runs once before, to be compiled."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    return graph.replay


def raw(source, name, blocks, *arguments):
    """Launch a kernel of `source`, compiled beside kernels.cu."""
    device = arguments[0].device
    kernel = on_cupy.compiled(device, (True, "float32", 0, True, False), name, source)
    driver.prepare(device, kernel, blocks, arguments)()


def seconds(f, repeats=20):
    """Median seconds of a call on the device."""
    f()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(np.median(times))

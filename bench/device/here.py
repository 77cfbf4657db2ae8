"""The device at hand, and what its checks and rates share."""

from statistics import median

import torch

from ... import kernels
from ...kernels.check.cases import COUNTER
from ...kernels.check.compare import same_bits

CUDA = torch.cuda.is_available()
NAMES = "triton", "cupy"
DEVICE = "cuda" if CUDA else "cpu"
SEED, TAG = COUNTER["seed"], COUNTER["tag"]
DRAW = {"seed": SEED, "tag": TAG}


def why_not(*names):
    """Why backends cannot run on this machine's GPU, or None."""
    if not CUDA:
        return "no CUDA device"
    absent = filter(kernels.why_not, names)
    return "; ".join(f"{name}: {kernels.why_not(name)}" for name in absent) or None


def same(a, b):
    """Whether two tensors hold the same bits, wherever they are."""
    return same_bits(a.cpu(), b.cpu())


def verdict(good, **more):
    """A part's result: passed, and what failed of {case: whether it is good}."""
    failures = [case for case, is_good in good.items() if not is_good]
    return {"passed": not failures, "failures": failures, **more}


def captured(f, calls=1):
    """A graph of calls of f, as a function; f runs once before, to be compiled."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    return graph.replay


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
    return median(times)

"""pytest bench: every kernel on each backend and peer under pytest-benchmark.

    python -m pytest bench --benchmark-enable [--benchmark-json F] [--benchmark-autosave]
    python -m pytest bench --benchmark-enable --benchmark-compare --benchmark-histogram

Without --benchmark-enable each runs once, checked. On a GPU the timer waits for the device.
"""

import time

import pytest
import torch

from minidiff.bench.peers import PEERS
from minidiff.bench.speed.clock import waiter
from minidiff.bench.speed.run import call, candidates, case, check_peer, gate, kernels_of, why_not
from minidiff.kernels import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronised():
    """Seconds, once the device has done all it was given."""
    waiter(DEVICE)()
    return time.perf_counter()


pytestmark = pytest.mark.benchmark(timer=synchronised)


@pytest.mark.parametrize("elements", [1 << 7, 1 << 20])
@pytest.mark.parametrize("name", candidates(None, DEVICE))
@pytest.mark.parametrize("op", kernels_of())
def test_update(benchmark, op, name, elements):
    benchmark.group = f"{op} {elements}"
    if reason := why_not(name, op, "float32", DEVICE):
        pytest.skip(f"{name}: {reason}")
    if benchmark.disabled and elements > 128:
        pytest.skip("one size is enough where nothing is timed")
    work, coef, _ = case(OPS[op], elements, "float32", DEVICE)
    f = call(name, work, coef)
    if name in PEERS:
        check_peer(name, f, work)
    else:
        assert gate(op, name, "float32")
    benchmark.pedantic(f, rounds=20, iterations=5, warmup_rounds=2)

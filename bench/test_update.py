"""pytest bench: one op an update, each backend and peer, under pytest-benchmark.

Histogram, compare and JSON are pytest-benchmark's own options.
"""

import pytest
import torch

from minidiff.bench.machine import machine
from minidiff.bench.peers import PEERS
from minidiff.bench.run import call, candidates, case, gate
from minidiff.kernels import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("elements", [1 << 10, 1 << 20])
@pytest.mark.parametrize("name", candidates(None, DEVICE))
@pytest.mark.parametrize("op", OPS)
def test_update(benchmark, op, name, elements):
    benchmark.group = f"{op} {elements}"
    benchmark.extra_info |= machine()
    assert gate(OPS[op], name, "float32") in ((True, None) if name in PEERS else (True,))
    f = call(name, *case(OPS[op], elements, "float32", DEVICE)[:3])

    def synchronised():
        f()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    benchmark.pedantic(synchronised, rounds=20, iterations=5, warmup_rounds=2)

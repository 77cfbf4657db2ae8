"""pytest bench: ours and the peers' forms of every row, under pytest-benchmark.

    python -m pytest bench --benchmark-enable [--benchmark-json F] [--benchmark-autosave]
    python -m pytest bench --benchmark-enable --benchmark-compare --benchmark-histogram

A row is an op at a size; its forms are one group. Each is checked whole before it is timed,
and ours after it as well, with fresh data. `extra_info` says what it moves: bytes, GB/s,
the fraction of a copy's rate, and whether the bits are NumPy's. Without --benchmark-enable
each runs once, checked. On a GPU the timer waits for the device.
"""

import time
from functools import cache
from statistics import median

import pytest
import torch

from minidiff.bench.speed.clock import once, waiter
from minidiff.bench.speed.run import candidates, gate, kernels_of, race_of, why_not
from minidiff.bench.speed.state import pin_malloc
from minidiff.bench.speed.sums import SUMS
from minidiff.bench.speed.yours import AFTER
from minidiff.kernels import BACKENDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUND = 1e-3  # seconds of a round, about
pin_malloc()


def synchronised():
    """Seconds, once the device has done all it was given."""
    waiter(DEVICE)()
    return time.perf_counter()


pytestmark = pytest.mark.benchmark(timer=synchronised)
good = cache(gate)


def copying(out):
    """Seconds that a copy of out's bytes takes, once its place is warm."""
    here, there = out.clone(), out.clone()
    there.copy_(here)
    return [once(lambda: there.copy_(here), waiter(DEVICE), 10) for _ in range(9)]


@pytest.mark.parametrize("elements", [1 << 7, 1 << 20])
@pytest.mark.parametrize("name", candidates(None, DEVICE))
@pytest.mark.parametrize("op", [*kernels_of(), *SUMS])
def test_form(benchmark, op, name, elements):
    benchmark.group = f"{op} {elements} float32"
    if reason := why_not(name, op, "float32", DEVICE):
        pytest.skip(f"{name}: {reason}")
    if benchmark.disabled and elements > 128:
        pytest.skip("one size is enough where nothing is timed")
    if name in BACKENDS:
        assert good(op, name, "float32")
    race = race_of(op, [name], elements, dtype="float32", device=DEVICE)
    race.check("nothing was timed", 0)
    (form,) = race.entrants.values()
    copied = copying(race.out)
    took = once(form.call, waiter(DEVICE), 3)
    calls = max(1, min(1000, int(ROUND / max(took, 1e-7))))
    benchmark.pedantic(form.call, rounds=20, iterations=calls, warmup_rounds=2)
    copied += copying(race.out)
    race.renew()
    race.check(AFTER, 1)
    benchmark.extra_info["bits"] = "same" if form.matches else "-"
    if form.bytes and not benchmark.disabled:
        rate = form.bytes / benchmark.stats.stats.median
        copy_rate = 2 * race.out.nbytes / median(copied)
        benchmark.extra_info |= {"bytes": form.bytes, "gb_per_s": round(rate / 1e9, 2),
                                 "fraction_of_copy": round(rate / copy_rate, 3)}

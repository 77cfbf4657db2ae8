"""Is it right: parts of the device check that compare a GPU with NumPy, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial, wraps
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from ...data import load
from ...kernels import (
    FLOATS,
    OPS,
    Fused,
    apply,
    bind,
    coefficients,
    dsm_loss,
    noise_norms,
    norms,
    update,
)
from ...kernels.check import check_op, check_sums
from ...kernels.check.cases import HARD, SHAPES
from ...kernels.check.compare import guarded, normals_at, oracle
from ...kernels.check.words import check_words, every_word, raw, stages
from ...kernels.sums import both_norms
from ...solvers import snr_step_size
from ...train import Trainer
from .here import DEVICE, DRAW, NAMES, SEED, TAG, captured, same, verdict


def words():
    """Random123's answers and a million random counters."""
    found = [row["passed"] for name in NAMES for row in check_words(name, 1_000_000)]
    return {"passed": all(found), "backends": NAMES}


def rows_of(name, op, shapes):
    """Rows of an op, or of the sums, on a backend."""
    if op == "sums":
        return list(check_sums(name, shapes=shapes, hard=[HARD]))
    return list(check_op(OPS[op], name, FLOATS, shapes, hard=[HARD]))


def rows():
    """Every op and the sums: dtypes and shapes of `check`, in processes that compile at
    once."""
    work = [(name, op, SHAPES) for op in (*OPS, "sums") for name in NAMES]
    with ProcessPoolExecutor(min(16, os.cpu_count()), get_context("spawn")) as pool:
        found = list(chain.from_iterable(pool.map(rows_of, *zip(*work))))
    failed = [r for r in found if not r["passed"]]
    return {"passed": not failed, "failures": failed[:20],
            **Counter(r["backend"] for r in found)}


ROOTS = """
extern "C" __global__ void roots(u64 *wrong) {
    u32 stride = gridDim.x * blockDim.x;
    for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < 0x7f800000u; i += stride) {
        float x = as_float((u32)i);
        if (as_uint(root(x)) != as_uint(__fsqrt_rn(x)))
            atomicAdd(wrong + (x >= 1e-7f && x <= 46.f ? 0 : 1), 1ull);
    }
}
"""


def square_root():
    """CUDA C's check-free root against sqrt.rn at every positive float32; in use: 1e-7 ...
    46."""
    wrong = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    raw(ROOTS, "roots", 132 * 8, wrong)
    inside, outside = wrong.tolist()
    return {"passed": inside == 0, "wrong_in_use": inside, "wrong_elsewhere": outside}


def all_stages():
    """Radius, cos, sin and normals of every float that a word can become and of every
    angle, against NumPy's."""
    words = every_word()
    wrong = dict.fromkeys(NAMES, 0)
    parts = np.split(words, range(2**20, len(words), 2**20))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part, want in zip(parts, pool.map(partial(stages, "numpy"), parts)):
            for name in wrong:
                got = stages(name, part)
                wrong[name] += int((got.view(np.int32) != want.view(np.int32)).sum())
    return {"passed": not any(wrong.values()), "words": len(words), "wrong": wrong}


# shapes, and by how many elements they are out of alignment
LAYOUTS = ((64, 1024), 0), ((64, 1024), 1), ((5, 33), 1), ((300, 2), 0)


def pair(shape, dtype="float32"):
    """x and s."""
    return [torch.randn(shape).to(getattr(torch, dtype)) for _ in "xs"]


def counters():
    """A device counter picks the row and the noise, in and out of place; arrays aligned and
    not, in every dtype; nothing is written beside the output."""
    good, table, step = {}, torch.randn(4, 3), torch.tensor(2, device=DEVICE)
    for name, dtype, (shape, shift) in product(NAMES, FLOATS, LAYOUTS):
        u = pair(shape, dtype)
        want = oracle(u, table[2], u[0], step=2, **DRAW)
        x, x_is_clean = guarded(u[0], u[0].dtype, DEVICE, shift)
        s, _ = guarded(u[1], u[1].dtype, DEVICE, shift)
        out, out_is_clean = guarded(torch.full_like(x, torch.nan), x.dtype, DEVICE, shift)
        found = [same(update([x, s], table, out=where, rows="step", step=step, backend=name,
                             **DRAW), want) for where in (out, x)]
        good[f"{name} {dtype} {shape} {shift}"] = all(found) and out_is_clean() and x_is_clean()
    return verdict(good, cases=len(good))


def by_backend(part):
    """A part of part(name) -> {case: whether it is good}, of both backends."""
    @wraps(part)
    def run():
        good = {}
        for name in NAMES:
            good |= part(name)
        return {"passed": all(good.values()), **good}
    return run


@by_backend
def side_stream(name):
    """On a stream of the caller's that is busy: the host waits for nothing, the bits are
    the same."""
    x, coef = torch.randn(4096, 1024), torch.tensor([.5, 2.], device=DEVICE)
    want, source = oracle([x], [.5, 2.], x, step=3, **DRAW), x.to(DEVICE)
    late = torch.full_like(source, torch.nan)
    out = late.clone()
    launch = partial(update, coef=coef, step=3, backend=name, **DRAW)
    launch([source])  # compiled before
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)  # cycles, some .2 s
        late.copy_(source)
        launch([late], out=out)
        waited = stream.query()
    stream.synchronize()
    return {name: not waited and same(out, want)}


@by_backend
def threads(name):
    """What was bound in one thread is launched by another, which has used no GPU before."""
    x = torch.randn(64, 1024)
    want, d = oracle([x], [.5, 2.], x, step=3, **DRAW), x.to(DEVICE)
    out = torch.full_like(d, torch.nan)
    f = bind([d], [.5, 2.], out=out, backend=name, **DRAW)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(f, 3).result()
    return {name: same(out, want)}


def replayed(advance, x0, s):
    """x after eight replays of advance(x, s, step), captured once, from x0 and step 0."""
    x, s = (u.to(DEVICE, copy=True) for u in (x0, s))
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def one():
        advance(x, s, step)
        step.add_(1)
    replay = captured(one)
    x.copy_(x0)
    step.zero_()
    for _ in range(8):
        replay()
    return x


@by_backend
def graph_replay(name):
    """One step captured, replayed eight times: a device counter picks the row and the
    noise."""
    table, good = coefficients(OPS["langevin"].step, eps=np.linspace(.1, .01, 8)), {}
    on_device = torch.from_numpy(table).float().to(DEVICE)

    def advance(x, s, step):
        update([x, s], on_device, rows="step", step=step, out=x, backend=name, **DRAW)
    for dtype, shape in (("float32", (257, 33)), ("bfloat16", (64, 1024))):
        x0, s = pair(shape, dtype)
        want = x0
        for k in range(8):
            want = oracle([want, s], table[k], s, step=k, **DRAW)
        good[f"{name} {dtype}"] = same(replayed(advance, x0, s), want)
    return good


def corrector(name):
    """f(x, s, k): a correction on a backend."""
    correct = Fused(SEED, backend=name).corrector(
        OPS["langevin"].step, snr_step_size, TAG)
    return lambda x, s, k: correct(k, x, s)


@by_backend
def corrector_replay(name):
    """A corrector's step captured, replayed eight times, against NumPy's: norms within an
    ulp move the step size, and so the states, by as much of themselves a step."""
    x0, s = pair((257, 33))
    correct, want = corrector("numpy"), x0.clone()
    for k in range(8):
        correct(want, s, k)
    found = replayed(corrector(name), x0, s).cpu()
    return {name: torch.allclose(found, want, rtol=1e-5, atol=1e-5)}


@by_backend
def two_norms(name):
    """A corrector's two norms, in one pass, are NumPy's within an ulp: rows of a warp and
    of several blocks, with a seed a row too."""
    good = {}
    seeds = {"seed": np.arange(7, 307) * 2**40, "sample": np.arange(300)}
    for shape, dtype in product(((300, 2), (64, 1024), (5, 33), (2, 90_001)), FLOATS):
        x, _ = pair(shape, dtype)
        want = noise_norms(x, backend="numpy", **DRAW), norms(x, backend="numpy")
        found = both_norms(x.to(DEVICE), backend=name, **DRAW)
        good[f"{name} {dtype} {shape}"] = all(map(near, found, want))
    x, _ = pair((300, 2))
    found, _ = both_norms(x.to(DEVICE), backend=name, tag=TAG, **seeds)
    good[f"{name} a seed a row"] = near(
        found, noise_norms(x, backend="numpy", tag=TAG, **seeds))
    return good


def near(found, want):
    """Whether norms are within a unit in the last place."""
    apart = found.cpu().view(torch.int32) - want.view(torch.int32)
    return bool((apart.abs() <= 1).all())


def large(mark=2**31, shapes=((2**21 + 3, 1024), (2, 2**30 + 8))):
    """More than `mark` bfloat16 elements, in place, in many rows and in two: the first
    row's start, what lies about element `mark` and the last row's end, against NumPy's."""
    good = {}
    for name, (rows, size) in product(NAMES, shapes):
        x = torch.empty((rows, size), dtype=torch.bfloat16, device=DEVICE).normal_()
        starts = ((0, 0), divmod(mark - 256, size), divmod(mark, size),
                  (rows - 1, size - 256))
        parts = {}
        for row, start in starts:
            quads = np.arange(start // 4, min(start // 4 + 64, size // 4))
            part = x[row, 4 * quads[0]:][:4 * len(quads)]
            z, = torch.from_numpy(normals_at([row], quads, SEED, tag=TAG))
            want = (.5 * part.float().cpu() + z).bfloat16()
            parts[f"{name} {rows}x{size} {row},{start}"] = part, want
        update([x], [.5, 1.], out=x, backend=name, **DRAW)
        good |= {case: same(*found) for case, found in parts.items()}
        del x, part, parts
    return verdict(good)


SANITIZED = """
import torch
from minidiff.kernels import dsm_loss, noise_norms, norms, update
for b in ("triton", "cupy"):
    for t in (torch.float32, torch.bfloat16):
        for d in (1, 3, 64, 1030):
            x = torch.ones(7, d, device="cuda").to(t)
            update([x, x], [1., 2., 3.], backend=b)
            norms(x, backend=b), noise_norms(x, backend=b), dsm_loss(x, [1., 2., 3.], backend=b)
torch.cuda.synchronize()
"""


def sanitizer(limit=150):
    """compute-sanitizer's memcheck, every tensor an allocation of its own, beside
    racecheck."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"passed": None, "reason": "compute-sanitizer is not installed"}
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--report-api-errors", "no", "--error-exitcode", "9"]
    end, found = time.time() + limit, {}
    runs = {check: subprocess.Popen(
        [tool, "--tool", check, *options, sys.executable, "-c", SANITIZED],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True) for check in ("memcheck", "racecheck")}
    for check, run in runs.items():
        try:
            said, _ = run.communicate(timeout=max(1., end - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            found[check] = None, f"more than {limit} s"
            continue
        ran = "not supported" not in said
        found[check] = run.returncode == 0 if ran else None, said.strip().splitlines()[-3:]
    passed = [ok for ok, _ in found.values()]
    return {"passed": min(passed, key=(False, None, True).index), **found}


def training(steps=3):
    """Batches, levels and noise of a run on a GPU are those of a run on the CPU, bit for
    bit."""
    def run(place):
        seen = []

        def perturbed(*arguments, **options):
            seen.append(apply(*arguments, **options))
            return seen[-1]
        engine = SimpleNamespace(apply=perturbed, dsm_loss=dsm_loss)
        trainer = Trainer(load("digits").train, engine, seed=SEED, device=place, levels=17)
        for _ in range(steps):
            trainer.advance()
        return seen
    pairs = list(zip(run("cpu"), run(DEVICE), strict=True))
    return {"passed": len(pairs) == steps and all(same(a, b) for a, b in pairs)}

"""The claim that a CPU cannot prove: Triton and CuPy on a device return NumPy's bits.

python -m minidiff.bench.device_check [PART ...] [--json FILE.json]: meant for six minutes of one
GPU. With no GPU, NumPy runs what they compile (bench/emulate.py). Each part prints a line: what it
did, and passed, FAILED, or why it could not run. Exit 1 on a failure. The JSON is written anew
after every part.
"""

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from ..__main__ import check_file, write_json
from ..data import load
from ..demo import EVALUATIONS, NetScore
from ..families import FAMILIES
from ..kernels import (
    BACKENDS,
    FLOATS,
    OPS,
    Fused,
    apply,
    bind,
    coefficients,
    driver,
    dsm_loss,
    missing,
    normal,
    on_cupy,
    on_triton,
    update,
)
from ..net import ScoreNet
from ..solvers import snr_step_size
from ..train import Trainer
from . import emulate
from .check import SHAPES, check_op, check_sums, check_words, normals_at
from .machine import machine
from .run import FORM, bench, call, case, kernels_of, show
from .stages import every_word, stages
from .sums import SUMS

CUDA = torch.cuda.is_available()
NAMES, DEVICE = ("triton", "cupy"), "cuda" if CUDA else "cpu"
PEERS = "torch_eager", "torch_inplace", "torch_compile"
SECONDS = .1  # of timing for each function: a GPU lent to one is quiet
VERDICTS = {True: "passed", False: "FAILED", None: "not run"}
SEED, TAG = 0x123456789ABCDEF, 2


class NotHere(Exception):
    """A part that this machine cannot run, and why."""


def lacking(names=NAMES):
    """What a GPU's backends lack to be run by one, or emulated; one must not pass for the other."""
    lacks = missing if CUDA and not on_triton.INTERPRET else emulate.lacking
    return "; ".join(f"{name}: {lacks(name)}" for name in names if lacks(name))


def compiled(*names):
    """The backends of a GPU, run by one or emulated, or NotHere."""
    if reason := lacking(names or NAMES):
        raise NotHere(reason)
    return names or NAMES


def on_device(*names):
    """The backends of a GPU, or NotHere."""
    if not CUDA:
        raise NotHere("no CUDA device")
    return compiled(*names)


def here():
    """A GPU's backends that can run; on a CPU all that can be run or emulated."""
    return [name for name in (NAMES if CUDA else BACKENDS[1:]) if not (
        lacking([name]) if name in NAMES else missing(name))]


def verdict(passed):
    """Of a part that runs what is here: where nothing failed but a backend lacks, not passed."""
    if reason := lacking():
        return {"passed": None if passed else False, "reason": reason}
    return {"passed": passed}


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


def device():
    """What the figures came from, beside the machine's line."""
    if not CUDA:
        raise NotHere("no CUDA device")
    p = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,clocks.max.mem,memory.total"
    smi = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], text=True,
                         capture_output=True).stdout if shutil.which("nvidia-smi") else ""
    return {"passed": True, "gpu": p.name, "multiprocessors": p.multi_processor_count,
            "l2_mb": p.L2_cache_size / 2**20, "memory_gb": p.total_memory / 1e9,
            "cuda": torch.version.cuda, "nvidia_smi": smi.strip().splitlines()}


def words():
    """Random123's answers and a million random counters."""
    found = [row for name in here() for row in check_words(name, 1_000_000)]
    return verdict(all(r["passed"] for r in found)) | {"backends": here()}


def rows_of(name, op, shapes):
    """Rows of an op, or of the sums, on a backend."""
    if not CUDA:
        emulate.emulate()
    return list(check_sums(name, shapes=shapes) if op == "sums" else
                check_op(OPS[op], name, FLOATS, shapes))


def rows():
    """Every op and the sums: dtypes and shapes of `check`, in processes that compile at once."""
    work = [(name, op, SHAPES) for op in (*OPS, "sums") for name in here()]
    with ProcessPoolExecutor(min(8, os.cpu_count()), get_context("spawn")) as pool:
        found = [row for part in pool.map(rows_of, *zip(*work)) for row in part]
    failed = [r for r in found if not r["passed"]]
    return verdict(not failed) | {"failures": failed[:20], **{
        name: sum(r["backend"] == name for r in found) for name in here()}}


ROOTS = """
extern "C" __global__ void roots(u64 *wrong) {
    u32 stride = gridDim.x * blockDim.x;
    for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < 0x7f800000u; i += stride) {
        float x = as_float((u32)i);
        if (as_uint(root(x)) != as_uint(__fsqrt_rn(x)))
            atomicAdd(wrong + (x >= 1e-7f && x <= 46.f ? 0 : 1), 1ull);
    }
}
extern "C" __global__ void products(u64 *out, int n) {
    u32 a = threadIdx.x, b = blockIdx.x, c = a ^ 7, d = b + 3;
    for (int i = 0; i < n; i++) {
        u64 p = (u64)a * 0xD2511F53u, q = (u64)c * 0xCD9E8D57u;
        a = (u32)(q >> 32) ^ b; b = (u32)q; c = (u32)(p >> 32) ^ d; d = (u32)p;
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = a ^ b ^ c ^ d;
}
extern "C" __global__ void specials(float *out, int n) {
    float a = threadIdx.x + 1.f, b = a + .5f, c = a + .25f, d = a + .125f;
    for (int i = 0; i < n; i++) { a = __sinf(a); b = __sinf(b); c = __sinf(c); d = __sinf(d); }
    out[blockIdx.x * blockDim.x + threadIdx.x] = a + b + c + d;
}
"""


def raw(name, blocks, *arguments):
    """Launch a kernel of ROOTS, compiled beside kernels.cu."""
    device = arguments[0].device
    kernel = on_cupy.compiled(device, (True, "float32", 0, True, False), name, ROOTS)
    driver.prepare(device, kernel, blocks, arguments)()


def square_root():
    """CUDA C's check-free root against sqrt.rn at every positive float32; in use: 1e-7 ... 46."""
    on_device("cupy")
    wrong = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    raw("roots", 132 * 8, wrong)
    inside, outside = wrong.tolist()
    return {"passed": inside == 0, "wrong_in_use": inside, "wrong_elsewhere": outside}


def all_stages():
    """Radius, cos, sin and normals of every float that a word can become and of every angle,
    against NumPy's; where they are emulated, of one in 64."""
    words = every_word()[::1 if CUDA else 64]
    wrong = dict.fromkeys(compiled(), 0)
    parts = np.split(words, range(2**20, len(words), 2**20))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part, want in zip(parts, pool.map(partial(stages, "numpy"), parts), strict=True):
            for name in wrong:
                got = stages(name, part)
                wrong[name] += int((got.view(np.int32) != want.view(np.int32)).sum())
    return {"passed": not any(wrong.values()), "words": len(words), "wrong": wrong}


def guarded(like, shift):
    """A view in the middle of a buffer of sevens, `shift` elements off alignment, and what
    tells whether the rest still holds them."""
    n, edge = like.numel(), 4096 + shift
    buffer = torch.full((n + 2 * edge,), 7., dtype=like.dtype, device=DEVICE)
    view = buffer[edge:edge + n].view(like.shape)
    return view.copy_(like), lambda: bool((buffer[:edge] == 7).all() and
                                          (buffer[edge + n:] == 7).all())


def counters():
    """A device counter picks the row and the noise, in and out of place; arrays aligned and not,
    in every dtype; nothing is written beside the output."""
    good, rng = {}, np.random.default_rng(1)
    table = rng.standard_normal((4, 3)).astype(np.float32)
    for name in compiled():
        for dtype in FLOATS:
            for shape, shift in (((64, 1024), 0), ((64, 1024), 1), ((5, 33), 1), ((300, 2), 0)):
                u = [torch.from_numpy(rng.standard_normal(shape, np.float32)).to(
                    getattr(torch, dtype)) for _ in "xs"]
                want = expected(shape, table[2], u, seed=SEED, step=2, tag=TAG)
                (x, clean_x), (s, _) = (guarded(v, shift) for v in u)
                out, clean = guarded(torch.full_like(u[0], torch.nan), shift)
                step = torch.tensor(2, device=DEVICE)
                ok = [same(update([x, s], table, out=o, rows="step", seed=SEED, step=step,
                                  tag=TAG, backend=name), want) for o in (out, x)]
                good[f"{name} {dtype} {shape} {shift}"] = all(ok) and clean() and clean_x()
    return {"passed": all(good.values()), "cases": len(good),
            "failures": [k for k, v in good.items() if not v]}


def side_stream():
    """On a stream of the caller's that is busy: the host waits for nothing, the bits are the
    same."""
    good = {}
    for name in on_device():
        x, coef = torch.randn(4096, 1024), torch.tensor([.5, 2.], device=DEVICE)
        want, source = expected(x.shape, [.5, 2.], [x], seed=SEED, step=3, tag=TAG), x.to(DEVICE)
        late, out = (torch.full_like(source, torch.nan) for _ in range(2))
        counter = {"seed": SEED, "step": 3, "tag": TAG, "backend": name}
        update([source], coef, **counter)  # compiled before
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(400_000_000)  # cycles, some .2 s
            late.copy_(source)
            update([late], coef, out=out, **counter)
            waited = stream.query()
        stream.synchronize()
        good[name] = not waited and same(out, want)
    return {"passed": all(good.values()), **good}


def threads():
    """What was bound in one thread is launched by another, which has used no GPU before."""
    good = {}
    for name in on_device():
        x = torch.randn(64, 1024)
        want, d = expected(x.shape, [.5, 2.], [x], seed=SEED, step=3, tag=TAG), x.to(DEVICE)
        out = torch.full_like(d, torch.nan)
        f = bind([d], [.5, 2.], seed=SEED, tag=TAG, out=out, backend=name)
        torch.cuda.synchronize()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(f, 3).result()
        good[name] = same(out, want)
    return {"passed": all(good.values()), **good}


def captured(f, calls=1):
    """A graph of calls of f, as a function; f runs once before, to be compiled."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    return graph.replay


def replayed(one, x, x0, step):
    """x after eight replays of one(), captured, from x0 and step 0."""
    replay = captured(one)
    x.copy_(x0)
    step.zero_()
    for _ in range(8):
        replay()
    return x


def graph_replay():
    """One step captured, replayed eight times: a device counter picks the row and the noise."""
    table = coefficients(OPS["langevin"].step, eps=np.linspace(.1, .01, 8))
    good = {}
    for name in on_device():
        for dtype, shape in (("float32", (257, 33)), ("bfloat16", (64, 1024))):
            x0, s = (torch.randn(shape).to(getattr(torch, dtype)) for _ in "xs")
            want = x0
            for k in range(8):
                want = expected(shape, table[k], [want, s], seed=SEED, step=k, tag=TAG)
            device_table = torch.from_numpy(table).float().to(DEVICE)
            x, d = (u.to(DEVICE, copy=True) for u in (x0, s))
            step = torch.zeros((), dtype=torch.int64, device=DEVICE)

            def one(x=x, d=d, step=step, name=name, device_table=device_table):
                update([x, d], device_table, rows="step", seed=SEED, step=step, tag=TAG, out=x,
                       backend=name)
                step.add_(1)
            good[f"{name} {dtype}"] = same(replayed(one, x, x0, step), want)
    return {"passed": all(good.values()), **good}


def corrector_replay():
    """A corrector's step captured, replayed eight times, against NumPy's: norms within an ulp
    move the step size, and so the states, by as much of themselves a step."""
    x0, s = (torch.randn(257, 33) for _ in "xs")
    oracle, want = Fused(SEED, backend="numpy"), x0.clone()
    for k in range(8):
        oracle.correct(OPS["langevin"].step, snr_step_size, want, s, k, TAG)
    good = {}
    for name in on_device():
        op, x, d = Fused(SEED, backend=name), *(u.to(DEVICE, copy=True) for u in (x0, s))
        step = torch.zeros((), dtype=torch.int64, device=DEVICE)

        def one(x=x, op=op, d=d, step=step):
            op.correct(OPS["langevin"].step, snr_step_size, x, d, step, TAG)
            step.add_(1)
        good[name] = torch.allclose(replayed(one, x, x0, step).cpu(), want, rtol=1e-5, atol=1e-5)
    return {"passed": all(good.values()), **good}


def large(mark=2**31, shapes=((2**21 + 3, 1024), (2, 2**30 + 8))):
    """More than `mark` bfloat16 elements, in place, in many rows and in two: the first row's start,
    what lies about element `mark` and the last row's end, against NumPy's."""
    good = {}
    for name in on_device():
        for rows, size in shapes:
            x = torch.full((rows, size), torch.nan, dtype=torch.bfloat16, device=DEVICE)
            parts = []
            for row, start in ((0, 0), divmod(mark - 256, size), divmod(mark, size),
                               (rows - 1, size - 256)):
                quads = np.arange(start // 4, min(start // 4 + 64, size // 4))
                part = x[row, 4 * quads[0]:][:4 * len(quads)]
                parts.append((f"{name} {rows}x{size} {row},{start}", row, quads, part.normal_()))
            wants = [(.5 * part.float().cpu() + torch.from_numpy(
                normals_at([row], quads, SEED, tag=TAG)[0])).bfloat16()
                for _, row, quads, part in parts]  # parts may overlap: all are filled by now
            update([x], [.5, 1.], out=x, seed=SEED, tag=TAG, backend=name)
            good |= {key: same(part, want) for (key, *_, part), want in zip(parts, wants)}
            del x, part, parts
    return {"passed": all(good.values()), "failures": [k for k, v in good.items() if not v]}


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
    """compute-sanitizer's memcheck, every tensor an allocation of its own, beside racecheck."""
    on_device()
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise NotHere("compute-sanitizer is not installed")
    environment, end = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, time.time() + limit
    runs = {check: subprocess.Popen(
        [tool, "--tool", check, "--report-api-errors", "no", "--error-exitcode", "9",
         sys.executable, "-c", SANITIZED], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True) for check in ("memcheck", "racecheck")}
    found = {}
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
    return {"passed": False if False in passed else None if None in passed else True, **found}


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


def rates():
    """Copy and fill, bytes a second; 64-bit products and special functions a second."""
    if not CUDA:
        raise NotHere("no CUDA device")
    a = torch.randn(2**29, device="cuda")
    b = torch.empty_like(a)
    found = {"copy_gb_per_s": 8 * a.numel() / seconds(lambda: b.copy_(a)) / 1e9,
             "fill_gb_per_s": 4 * a.numel() / seconds(lambda: b.fill_(1.)) / 1e9}
    if missing("cupy"):
        return {"passed": None, "reason": f"cupy: {missing('cupy')}", **found}
    blocks, n = 132 * 16, 4096
    out = torch.empty(blocks * on_cupy.THREADS, dtype=torch.int64, device="cuda")
    for name, each in (("products", 2), ("specials", 4)):
        time_ = seconds(lambda name=name: raw(name, blocks, out, ctypes.c_int(n)))
        found[f"{name}_per_s"] = each * n * len(out) / time_
    return {"passed": True, **found}


def timing():
    """Every kind of update and sum against the peers, gate first."""
    if not CUDA:
        found = bench(["normal", FORM.name], ["host", *PEERS[:2]], [1 << 20])
        print(show(found))
        return {"passed": True, "rows": found}
    on_device()
    found = []
    for dtype in ("float32", "bfloat16"):
        names = [*NAMES, *PEERS, *(["cupy_expr"] if dtype == "float32" else [])]
        main = ["normal", FORM.name]
        if dtype == "float32":
            found += bench(main[:1], ["curand"], [1 << 20, 1 << 28], dtype, "cuda", seconds=SECONDS)
        rest = [name for name in kernels_of() if name not in main]
        found += bench(main, names, [1 << 20, 1 << 28], dtype, "cuda", seconds=SECONDS)
        found += bench([*rest, *SUMS], names, [1 << 28], dtype, "cuda", seconds=SECONDS)
    print(show(found))
    return {"passed": True, "rows": found}


def launches(calls=20):
    """A small update, 2^20 elements: microseconds of the host to launch it, and of the device in
    a graph of many."""
    found = {}
    for name in (*on_device(), *PEERS):
        work, coef, _ = case(FORM, 1 << 20, "float32", "cuda")
        f = call(name, work, coef)
        for _ in range(3):
            f()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            f()
        host = (time.perf_counter() - start) / 200
        torch.cuda.synchronize()
        found[name] = {"host_us": host * 1e6,
                       "device_us": seconds(captured(f, calls)) / calls * 1e6}
        print(f"{name:<16}{host * 1e6:>8.1f} us of the host{found[name]['device_us']:>8.1f} us of "
              "the device")
    return {"passed": True, **found}


def whole_samplers(n=360, shape=(1, 8, 8)):
    """Every family, network and updates, in one CUDA graph: the bits of its loop uncaptured; and
    milliseconds of either. The network has weights that nobody trained, and the demo's shape."""
    on_device()
    torch.manual_seed(0)
    net = ScoreNet(shape).to(DEVICE).eval().requires_grad_(False)
    torch.nn.init.normal_(net.F_x.out.weight, std=.02)
    z, good, times = normal((n, *shape), device=DEVICE, seed=SEED), {}, {}
    for name, family in FAMILIES.items():
        if name == "pf_ode_adaptive":  # SciPy's loop: its steps depend on what they find
            continue
        op, score = Fused(SEED), NetScore(net)

        evaluations = EVALUATIONS.get(name, 80)

        def run(family=family, op=op, score=score, evaluations=evaluations):
            *_, x = family(score, z, evaluations, op)
            return x
        want, states = run(), []
        graph = captured(lambda run=run, states=states: states.append(run()))
        graph()
        good[name] = same(states[-1], want)
        times[name] = {"evaluations": score.evaluations // 3, "ms": seconds(run, 5) * 1e3,
                       "graph_ms": seconds(graph, 5) * 1e3}
    return {"passed": all(good.values()), "failures": [k for k, v in good.items() if not v],
            "times": times}


def training(steps=3):
    """Batches, levels and noise of a run on a GPU are those of a run on the CPU, bit for bit."""
    on_device()
    seen = {}
    for place in ("cpu", DEVICE):
        seen[place] = []

        def perturbed(*a, place=place, **kw):
            x = apply(*a, **kw)
            seen[place].append(x.cpu())
            return x
        trainer = Trainer(load("digits").train, SimpleNamespace(
            apply=perturbed, dsm_loss=dsm_loss), seed=SEED, device=place, levels=17)
        for _ in range(steps):
            trainer.advance()
    pairs = list(zip(seen["cpu"], seen[DEVICE], strict=True))
    return {"passed": len(pairs) == steps and all(same(a, b) for a, b in pairs)}


# what could leave the device in a bad state comes last; rows have processes of their own, and
# leave what they compiled to those that follow
PARTS = device, words, square_root, all_stages, rows, rates, launches, timing, counters, \
    side_stream, threads, graph_replay, corrector_replay, whole_samplers, training, large, \
    sanitizer


def main():
    """Run every part, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", "--out", metavar="FILE.json", help="where to write what was "
                        "found, such as bench/results/device/DATE-GPU.json")
    parser.add_argument("parts", nargs="*", metavar="PART", help="some of "
                        + ", ".join(part.__name__ for part in PARTS) + " (default: all)")
    args = parser.parse_args()
    known = {part.__name__: part for part in PARTS}
    if unknown := [name for name in args.parts if name not in known]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    if args.json:
        try:
            check_file("--json", args.json)
        except ValueError as e:
            parser.error(str(e))
    if not CUDA:
        emulate.emulate()
    results = {"machine": machine(), "date": time.strftime("%Y-%m-%d"),
               "kernels": lacking() or ("run by the GPU" if CUDA else
                                        "compiled for sm_90, run by NumPy"), "parts": {}}
    for key, value in (results["machine"] | {"kernels": results["kernels"]}).items():
        print(f"{key:<14}{value}")
    for part in [known[name] for name in args.parts or known]:
        start = time.perf_counter()
        try:
            result = part()
        except NotHere as e:
            result = {"passed": None, "reason": str(e)}
        except Exception as e:  # one broken part must not hide the others
            result = {"passed": False, "reason": f"{type(e).__name__}: {e}"}
        result["seconds"] = round(time.perf_counter() - start, 2)
        results["parts"][part.__name__] = result
        word = VERDICTS[result["passed"]]
        more = {k: v for k, v in result.items() if k not in ("passed", "rows", "seconds")}
        print(f"{part.__name__:<18}{word:<9}{result['seconds']:>7.1f} s  {more}", flush=True)
        if args.json:
            write_json(args.json, results)
    found = [p["passed"] for p in results["parts"].values()]
    print(*(f"{found.count(value)} {word}" for value, word in VERDICTS.items()), sep=", ")
    return int(False in found)


if __name__ == "__main__":
    sys.exit(main())

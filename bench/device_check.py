"""The claim that a CPU cannot prove: Triton and CuPy on a device return NumPy's bits.

python -m minidiff.bench.device_check [--out FILE.json]: meant for five minutes of one GPU.
Each part prints a line: what it did, and passed, FAILED, or why it could not run. Exit 1 on a
failure.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from .. import noise
from ..kernels import FLOATS, OPS, Fused, coefficients, missing, on_cupy, update
from ..solvers import snr_step_size
from .check import check_op, check_sums, check_words
from .machine import machine
from .run import bench, show
from .words import triton_radius

CUDA = torch.cuda.is_available()
DEVICES = [n for n in ("triton", "cupy") if not missing(n)] if CUDA else []
SEED, TAG = 0x123456789ABCDEF, 2


class NotHere(Exception):
    """A part that this machine cannot run, and why."""


def on_device():
    if not DEVICES:
        raise NotHere("; ".join(f"{n}: {missing(n) or 'interpreter only'}"
                                for n in ("triton", "cupy")))


def same(a, b):
    """Whether two float32 tensors hold the same bits."""
    return bool(torch.equal(a.cpu().contiguous().view(torch.int32),
                            b.cpu().contiguous().view(torch.int32)))


def expected(shape, coef, operands=(), **counter):
    out = torch.empty(shape)
    return update([u.float().cpu() for u in operands], coef, out=out, backend="numpy", **counter)


def words():
    """Random123's answers and a million random counters."""
    names = DEVICES or [n for n in ("triton", "host", "torch") if not missing(n)]
    rows = [row for name in names for row in check_words(name, 1_000_000)]
    return {"passed": all(r["passed"] for r in rows), "backends": names}


def rows():
    """Every op and sum on triton and cupy: dtypes and shapes of `check`."""
    names = DEVICES or [n for n in ("triton", "host") if not missing(n)]
    shapes = {} if DEVICES else {"shapes": [(3, 5), (2, 64)]}
    found = [row for name in names for op in OPS.values()
             for row in check_op(op, name, FLOATS, **shapes)]
    found += [row for name in names for row in check_sums(name, **shapes)]
    failed = [r for r in found if not r["passed"]]
    return {"passed": not failed, "rows": len(found), "failed": failed[:20], "backends": names}


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


def raw(name):
    """A kernel of ROOTS, compiled beside kernels.cu."""
    on_device()
    if "cupy" not in DEVICES:
        raise NotHere(f"cupy: {missing('cupy')}")
    import cupy
    return cupy.RawKernel(on_cupy.SOURCE.read_text() + ROOTS, name,
                          on_cupy.options("float32", 0, True, False))


def square_root():
    """The check-free root against sqrt.rn at every positive float32; in use: 1e-7 ... 46."""
    kernel = raw("roots")
    import cupy
    wrong = cupy.zeros(2, "uint64")
    kernel((132 * 8,), (256,), (wrong,))
    inside, outside = map(int, wrong.get())
    return {"passed": inside == 0, "wrong_in_use": inside, "wrong_elsewhere": outside}


def all_radii():
    """Triton's radius of every 2^32 words in steps of 61, against NumPy's."""
    on_device()
    w = np.arange(0, 2**32, 61, np.uint64).astype(np.uint32)
    good = (triton_radius(w).view(np.int32) == noise.radius(w).view(np.int32)).all()
    return {"passed": bool(good), "words": len(w)}


def side_stream():
    """The same bits from a stream of the caller's, with no synchronisation but its own."""
    on_device()
    x = torch.randn(4096, 1024)
    want = expected(x.shape, [.5, 2.], [x], seed=SEED, step=3, tag=TAG)
    good = {}
    for name in DEVICES:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = x.pin_memory().to("cuda", non_blocking=True)
            for _ in range(20):
                late = late + 0.
            out = update([late], [.5, 2.], seed=SEED, step=3, tag=TAG, backend=name)
        stream.synchronize()
        good[name] = same(out, want)
    return {"passed": all(good.values()), **good}


def graph_replay():
    """One step captured, replayed eight times: a device counter picks the row and the noise."""
    on_device()
    table = coefficients(OPS["langevin"].step, eps=np.linspace(.1, .01, 8))
    x0, s = torch.randn(257, 33), torch.randn(257, 33)
    want = x0
    for k in range(8):
        want = expected(x0.shape, table[k], [want, s], seed=SEED, step=k, tag=TAG)
    good = {}
    for name in DEVICES:
        device_table = torch.from_numpy(table).float().cuda()
        x, d, step = x0.cuda(), s.cuda(), torch.zeros((), dtype=torch.int64, device="cuda")

        def one(x=x, d=d, step=step, name=name, device_table=device_table):
            update([x, d], device_table, seed=SEED, step=step, tag=TAG, out=x, backend=name)
            step.add_(1)
        one()  # compile outside the capture
        x.copy_(x0)
        step.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one()
        for _ in range(8):
            graph.replay()
        good[name] = same(x, want)
    return {"passed": all(good.values()), **good}


def corrector_replay():
    """A corrector's step captured, replayed eight times, beside eight steps; a sum's order may
    move its last bit."""
    on_device()
    x0, s, good = torch.randn(257, 33), torch.randn(257, 33), {}
    for name in DEVICES:
        op, d, x, want = Fused(SEED, backend=name), s.cuda(), x0.cuda(), x0.cuda()
        step = torch.zeros((), dtype=torch.int64, device="cuda")

        def one(u, op=op, d=d, step=step):
            op.correct(OPS["langevin"].step, snr_step_size, u, d, step, TAG)
            step.add_(1)
        for _ in range(8):
            one(want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one(x)
        step.zero_()
        for _ in range(8):
            graph.replay()
        good[name] = torch.allclose(x, want, rtol=1e-5, atol=1e-5)
    return {"passed": all(good.values()), **good}


def large():
    """More than 2^31 bfloat16 elements, as many rows and as few: ends compared with NumPy."""
    on_device()
    good = {}
    for name in DEVICES:
        for rows, size in ((2**21 + 3, 1024), (2, 2**30 + 8)):
            out = torch.empty((rows, size), dtype=torch.bfloat16, device="cuda")
            update([], [1.], out=out, seed=SEED, tag=TAG, backend=name)
            quads = np.arange(size // 4 - 64, size // 4)
            key = SEED & 0xFFFFFFFF, SEED >> 32
            w = np.stack(noise.philox((quads, rows - 1, 0, TAG), key), -1)
            want = torch.from_numpy(noise.to_normal(w).reshape(-1)).bfloat16()
            good[f"{name} {rows}x{size}"] = bool(torch.equal(out[-1, -256:].cpu(), want))
            del out
    return {"passed": all(good.values()), **good}


SANITIZED = ("import torch; from minidiff.kernels import update; "
             "[update([torch.ones(7, d, device='cuda').to(t)] * 2, [1., 2., 3.], backend=b) "
             "for d in (1, 3, 64, 1030) for t in (torch.float32, torch.bfloat16) "
             "for b in {names}]; torch.cuda.synchronize()")


def sanitizer():
    """compute-sanitizer, memcheck and racecheck, on a small selection."""
    on_device()
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise NotHere("compute-sanitizer is not installed")
    results = {}
    for check in ("memcheck", "racecheck"):
        try:
            run = subprocess.run([tool, "--tool", check, "--error-exitcode", "9", sys.executable,
                                  "-c", SANITIZED.format(names=DEVICES)], capture_output=True,
                                 text=True, timeout=90)
        except subprocess.TimeoutExpired:
            raise NotHere(f"{check} took more than 90 s") from None
        results[check] = (run.stdout + run.stderr).strip().splitlines()[-1:]
        if "not supported" in run.stdout + run.stderr:
            raise NotHere(results[check][0])
        results[f"{check} ok"] = run.returncode == 0
    return {"passed": all(v for k, v in results.items() if k.endswith("ok")), **results}


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
    on_device()
    a = torch.randn(2**29, device="cuda")
    b = torch.empty_like(a)
    found = {"copy_gb_per_s": 8 * a.numel() / seconds(lambda: b.copy_(a)) / 1e9,
             "fill_gb_per_s": 4 * a.numel() / seconds(lambda: b.fill_(1.)) / 1e9}
    blocks, threads, n = 132 * 16, 256, 4096
    out = torch.empty(blocks * threads, dtype=torch.int64, device="cuda")
    import cupy
    with cupy.cuda.Stream.from_external(torch.cuda.current_stream()) as stream:
        for name, each in (("products", 2), ("specials", 4)):
            kernel = raw(name)
            time_ = seconds(lambda k=kernel: k((blocks,), (threads,), (out.data_ptr(), n),
                                               stream=stream))
            found[f"{name}_per_s"] = each * n * blocks * threads / time_
    return {"passed": True, **found}


def timing():
    """update and normal against the peers, gate first."""
    device = "cuda" if CUDA else "cpu"
    peers = ["torch_eager", "torch_inplace"] + ["torch_compile"] * CUDA
    found = [row for dtype in (("float32", "bfloat16") if CUDA else ("float32",))
             for row in bench(["normal", "langevin"], (DEVICES or ["host"]) + peers,
                              [1 << 20, 1 << 28] if CUDA else [1 << 20], dtype, device)]
    print(show(found))
    return {"passed": True, "rows": found}


PARTS = words, rows, square_root, all_radii, side_stream, graph_replay, corrector_replay, large, \
    sanitizer, rates, timing


def main():
    """Run every part, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="where to write the JSON")
    args = parser.parse_args()
    results = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "parts": {}}
    for key, value in results["machine"].items():
        print(f"{key:<14}{value}")
    for part in PARTS:
        start = time.perf_counter()
        try:
            result = part()
        except NotHere as e:
            result = {"passed": None, "reason": str(e)}
        except Exception as e:  # one broken part must not hide the others
            result = {"passed": False, "reason": f"{type(e).__name__}: {e}"}
        result["seconds"] = round(time.perf_counter() - start, 2)
        results["parts"][part.__name__] = result
        word = {True: "passed", False: "FAILED", None: "not run"}[result["passed"]]
        more = {k: v for k, v in result.items() if k not in ("passed", "rows", "seconds")}
        print(f"{part.__name__:<18}{word:<9}{result['seconds']:>7.1f} s  {more}", flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    return int(any(p["passed"] is False for p in results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())

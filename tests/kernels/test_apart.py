"""A user's kernel in a process of its own: whatever it does, it is not believed."""

import json
import os
import re
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff.__main__ import main
from minidiff.kernels.check.compare import Near, compare
from minidiff.kernels.check.yours import UserKernels, apart
from minidiff.kernels.check.yours.apart import check

HEAD = """
import ctypes, os, signal, sys, threading, time
import numpy as np
from minidiff import noise
def columns(x, coef):
    return [k.reshape(-1, *[1] * (x.ndim - 1)) for k in np.moveaxis(coef, -1, 0)]
def right(x, s, z, coef):
    a, b, c = columns(x, coef)
    return (a * x + b * s) + c * z
def put(array, at, value):
    place = array.ctypes.data + array.itemsize * at
    ctypes.c_float.from_address(place).value = value
calls, kept = 0, {}
"""
GIVEN, DRAWS = "x, s, z, coef", "x, s, coef, seed, sample, step, tag"
OUT = "x, s, z, coef, out"
DRAWN = "return right(x, s, noise.normal(x.shape, seed, sample, step, tag), coef)"
PAIRS = """
w = noise.words(x.shape, seed, sample, step, tag)
u = (w[..., ::2] + .5) * 2.**-32
angle = w[..., 1::2]
r = noise.radius(w[..., ::2])
r = np.where(angle >> 31 & 1, -r, r)
cos, sin = noise.cos_sin(angle)
LINE
z = np.stack((r * cos, r * sin), -1).reshape(w.shape).astype(np.float32)
return right(x, s, noise.elements(z, x.shape), coef)
"""

# name: (arguments, body, what the first failed row must say)
WRONG = {
    # arithmetic
    "fused": (GIVEN, "a, b, c = columns(x, coef)\n"
              "return noise.fma(c, z, noise.fma(b, s, a * x))", "fused multiply-add gives"),
    "first product fused": (GIVEN, "a, b, c = columns(x, coef)\n"
                            "return noise.fma(a, x, b * s) + c * z", "enable_fp_fusion=False"),
    "float64": (GIVEN, "return right(*(t.astype(float) for t in (x, s, z, coef))).astype('f')",
                "computed in float64"),
    "order": (GIVEN, "a, b, c = columns(x, coef)\nreturn a * x + (b * s + c * z)",
              "another order"),
    "flushed": (GIVEN, "r = right(x, s, z, coef)\nr[abs(r) < 2**-126] *= 0\nreturn r",
                "subnormals flushed"),
    "inputs flushed": (GIVEN, "x, s, z, coef = (np.where(abs(t) < 2**-126, 0 * t, t) "
                       "for t in (x, s, z, coef))\nreturn right(x, s, z, coef)",
                       "subnormals flushed"),
    "minus zero": (GIVEN, "return right(x, s, z, coef) + np.float32(0)", "sign of zero"),
    "zero skipped": (GIVEN, "a, b, c = columns(x, coef)\n"
                     "return np.where(a == 0, 0, a * x) + np.where(b == 0, 0, b * s) + c * z",
                     "NaN lost"),
    # what is read
    "row 0": (GIVEN, "return right(x, s, z, coef.reshape(-1, 3)[:1])" , "row 0's coefficients"),
    "row before": (GIVEN, "return right(x, s, z, np.roll(coef, 1, 0) if coef.ndim > 1 else coef)",
                   "coefficients of the row before"),
    "z alone": ("z", "return z", "elements differ"),
    # the counter
    "high word": (DRAWS, "seed &= 0xFFFFFFFF\n" + DRAWN, "high word of the seed ignored"),
    "int64": (DRAWS, "seed &= ~(1 << 63)\n" + DRAWN, "bit 63 of the seed lost"),
    "no sample": (DRAWS, "sample = 0\n" + DRAWN, "sample ignored"),
    "int32 step": (DRAWS, "step &= ~(1 << 31)\n" + DRAWN, "bit 31 of step lost"),
    "no tag": (DRAWS, "tag = 0\n" + DRAWN, "tag ignored"),
    "exchanged": (DRAWS, "step, tag = tag, step\n" + DRAWN, "step and tag exchanged"),
    "next step": (DRAWS, "step += 1\n" + DRAWN, "step off by one"),
    "hard-coded": ("x, s, coef", "return right(x, s, noise.normal(x.shape, 1, 2, 3, 4), coef)",
                   "cannot be the counter's"),
    "no wrap": (DRAWS, """
if sample + len(x) > 2**32: sample = 2**32 - 1
""" + DRAWN, "elements differ"),
    # the noise's stages
    "cos for sin": (DRAWS, PAIRS.replace("LINE", "cos, sin = sin, cos"), "cos and sin exchanged"),
    "sign": (DRAWS, PAIRS.replace("LINE", "r = abs(r)"), "radius's sign"),
    "radius": (DRAWS, PAIRS.replace("LINE", "r = r / np.float32(2**.5)"), "is the radius"),
    "angle": (DRAWS, PAIRS.replace("LINE", "cos, sin = np.cos(u), np.sin(u)"), "the angle"),
    "words": (DRAWS, PAIRS.replace("step, tag)", "tag ^ step, 77)").replace("LINE", ""),
              "is the words"),
    "library": (DRAWS, PAIRS.replace("LINE", "r = np.sign(r) * np.sqrt(-2 * np.log(u))"),
                "right to about three digits"),
    # where
    "one block": (GIVEN, "r = right(x, s, z, coef)\nr.ravel()[1024:] = 0\nreturn r",
                  "wrong from element 1024 on"),
    "grid": (GIVEN, "r = right(x, s, z, coef)\nr[65535:] = 0\nreturn r", "from element 196605 on"),
    "block": (GIVEN, "r = right(x, s, z, coef)\nr.reshape(len(r), -1)[:, 65536:] = 0\nreturn r",
              "from element 65536 on"),
    "rest": (GIVEN, "r = right(x, s, z, coef)\nn = r.size // 4 * 4\nr.ravel()[n:] = 0\nreturn r",
             "elements differ"),
    "last": (GIVEN, "r = right(x, s, z, coef)\nif r.size > 9: r.flat[5] = 0\nreturn r",
             "element 5 of"),
    # what may not be touched
    "beyond": (OUT, "out[...] = right(x, s, z, coef)\nput(out, out.size, 1e9)",
               "wrote up to 4 bytes beyond the end of out"),
    "before": (OUT, "out[...] = right(x, s, z, coef)\nput(x, -2, 1e9)",
               "wrote from 8 bytes before the start of x"),
    "far": (GIVEN, "put(z, z.size + 30_000, 1e9)\nreturn right(x, s, z, coef)",
            "beyond the end of z"),
    "in place": (OUT, "a, b, c = columns(x, coef)\nnp.multiply(b, s, out=out)\n"
                 "out[...] = (a * x + out) + c * z", "in place: "),
    "x": (GIVEN, "x[...] = right(x, s, z, coef)\nreturn x", "changed x"),
    "s": (GIVEN, "r = right(x, s, z, coef)\ns *= 0\nreturn r", "changed s"),
    "z": (GIVEN, "r = right(x, s, z, coef)\nz += 1\nreturn r", "changed z"),
    "coef": (GIVEN, "r = right(x, s, z, coef)\ncoef += 1\nreturn r", "changed coef"),
    "s in place": (OUT, "r = right(x, s, z, coef)\ns *= 0\nout[...] = r", "changed s"),
    # what is returned
    "stale": (GIVEN, "key = x.shape, coef.shape\nr = right(x, s, z, coef)\n"
              "return kept.setdefault(key, r) if len(x) > 9999 else r", "elements differ"),
    "untouched": (OUT, "return out", "elements differ"),
    "half": (OUT, "out[:1] = right(x, s, z, coef)[:1]", "elements differ"),
    "float64s": (GIVEN, "return right(x, s, z, coef).astype(float)",
                 r"returned float64 \(0, 3\), not float32 \(0, 3\)"),
    "flat": (GIVEN, "return right(x, s, z, coef).ravel()",
             r"returned float32 \(0,\), not float32 \(0, 3\)"),
    "nothing": (GIVEN, "right(x, s, z, coef)", "returned a NoneType"),
    "two": (GIVEN, "return [right(x, s, z, coef)] * 2, 0", "returned 2 results, not 1"),
    "a list": (GIVEN, "return right(x, s, z, coef).tolist()", "returned a list"),
    "lucky": (GIVEN, "r = right(x, s, z, coef)\nif r.size: r.flat[0] += np.random.rand()\n"
              "return r", "elements differ"),
    "another": (GIVEN, "global calls\ncalls += 1\nr = right(x, s, z, coef)\n"
                "return r + 1 if calls % 2 == 0 else r", "called again"),
    "late": (GIVEN, "global calls\ncalls += 1\n"
             "return right(x, s, z, coef) if calls < 150 else x", "many small ones"),
    # how it ends
    "raises": (GIVEN, "return 1 / 0", r"ZeroDivisionError: division by zero \(.*wrong.py, line"),
    "exits": (GIVEN, "sys.exit(0)", r"SystemExit: 0 \(.*wrong.py, line"),
    "interrupts": (GIVEN, "raise KeyboardInterrupt", "KeyboardInterrupt"),
    "leaves": (GIVEN, "os._exit(0)", "ended its process with exit status 0, called with x, s, z"),
    "crashes": (GIVEN, "ctypes.string_at(0)", r"crashed in .*wrong.py, line \d+ \(SIGSEGV\)"),
    "aborts": (GIVEN, "os.abort()", r"crashed in .*wrong.py, line \d+ \(SIGABRT\)"),
    "harms and crashes": (GIVEN, "put(s, s.size, 1e9)\nctypes.string_at(0)",
                          r"crashed.*, after it wrote up to 4 bytes beyond the end of s"),
    "killed": (GIVEN, "os.kill(os.getpid(), signal.SIGKILL)", "was killed"),
    "later": (GIVEN, "threading.Timer(.01, os._exit, [0]).start()\ntime.sleep(.02)\n"
              "return right(x, s, z, coef)", "ended its process with exit status 0"),
    "silent": (GIVEN, "os.closerange(3, 500)\ntime.sleep(60)", "answered no more|SIGKILL|ended"),
    "sleeps": (GIVEN, "time.sleep(60)", "takes more than 5 s"),
    "everyday seed": (DRAWS, "seed |= 1 << 63\n" + DRAWN, "elements differ"),
    "everyday step": (DRAWS, "step |= 1 << 31\n" + DRAWN, "elements differ"),
    "seed or": (DRAWS, "seed = seed or 12345\n" + DRAWN, "elements differ"),
    "out is x": (OUT, "r = right(x, s, z, coef)\nout[...] = r * 0 if out is x else r",
                 "in place: .*elements differ"),
    "operands": ("x, s, z, coef", "return right(s, x, z, coef)", "operands, or their coefficients"),
    "coefficients": (GIVEN, "return right(x, s, z, coef[..., [1, 0, 2]])",
                     "operands, or their coefficients"),
    "masked": (GIVEN, "return np.ma.masked_all_like(right(x, s, z, coef))",
               "returned a MaskedArray"),
    "second crash": (GIVEN, "global calls\ncalls += 1\nif calls > 1: ctypes.string_at(0)\n"
                     "return right(x, s, z, coef)",
                     r"\(SIGSEGV\), called with x, s, z, coef; None"),
    "half an answer": (GIVEN, "for fd in range(3, 500):\n"
                       "    try: os.write(fd, b'{')\n    except OSError: pass\n"
                       "time.sleep(60)", "takes more than 5 s"),
    "empty answer": (GIVEN, "import socket, stat\nfor fd in range(3, 500):\n"
                     "    try:\n        if stat.S_ISSOCK(os.fstat(fd).st_mode): "
                     "os.write(fd, b'{}\\n')\n    except OSError: pass\n"
                     "return right(x, s, z, coef)", "said what is no answer"),
    "shrinks": (GIVEN, "for fd in range(3, 500):\n    try: os.ftruncate(fd, 0)\n"
                "    except OSError: pass\nreturn x", "elements differ"),
    "a child": (GIVEN, "if os.fork() == 0: time.sleep(60)\nctypes.string_at(0)", "SIGSEGV"),
    "escapes": (GIVEN, "raise ValueError('\\x1b[2J' + 'x' * 2**21)", r"ValueError: \?\[2Jx+ \("),
    "forges": (GIVEN, "for fd in range(3, 500):\n"
               "    try: os.write(fd, b'\\0\\0\\0\\x0e{\"results\": 0}')\n"
               "    except OSError: pass\nos._exit(0)", "ended its process|is no answer"),
}


def source(kinds):
    """A file of them, each a version of langevin."""
    text = HEAD
    for k, (arguments, body, *_) in enumerate(kinds.values()):
        text += f"def langevin_v{k}({arguments}):\n" + textwrap.indent(body.strip(), "    ") + "\n"
    return text


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """{kind: its failed rows} of a check of all of them, one file."""
    file = tmp_path_factory.mktemp("wrong") / "wrong.py"
    file.write_text(source(WRONG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "BEYOND", [(70_001, 3), (70_001, 3), (1, 2**17 + 3)])
        patch.setattr(apart, "SECONDS", .4)
        patch.setattr(apart, "LIMIT", 5.)
        rows = list(check([file], seed=1))
    names = [f"{file}:langevin_v{k}" for k in range(len(WRONG))]
    found = {name: [] for name in names}
    for row in rows:
        if not row["passed"]:
            found[row["backend"]].append(row)
    return dict(zip(WRONG, found.values()))


def said(row):
    """All that a row says."""
    return f"{row['reason']}; {row['explained']}"


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_kernel_is_refused_for_the_right_reason(kind, verdicts):
    failed = verdicts[kind]
    assert failed
    assert any(re.search(WRONG[kind][2], said(row)) for row in failed), said(failed[0])


# ---- good ones ----

NUMPY = """
import numpy as np
def langevin(x, s, z, coef):
    a, b, c = (k.reshape(-1, *[1] * (x.ndim - 1)) for k in np.moveaxis(coef, -1, 0))
    return (a * x + b * s) + c * z
def ddpm_clipped(x, s, z, coef, clip):
    a, b, c = (k.reshape(-1, *[1] * (x.ndim - 1)) for k in np.moveaxis(coef, -1, 0))
    p0, p1, lo, hi = (k.reshape(-1, *[1] * (x.ndim - 1)) for k in np.moveaxis(clip, -1, 0))
    d = p0 * x + p1 * s
    d = np.where(d < lo, lo, d)
    d = np.where(d > hi, hi, d)
    return (a * x + b * d) + c * z
"""
TORCH = """
ARRAYS = "torch"
def langevin_v1(x, s, z, coef, out):
    a, b, c = (k.reshape(-1, *[1] * (x.ndim - 1)) for k in coef.unbind(-1))
    r = (a * x.float() + b * s.float()) + c * z
    out.copy_(r)
def langevin_v2(x, s, z, eps, out):
    eps = eps if isinstance(eps, float) else eps.view(-1, *[1] * (x.ndim - 1))
    b = eps / 2 if isinstance(eps, float) else (eps / 2).float()
    c = eps**.5 if isinstance(eps, float) else eps.sqrt().float()
    return out.copy_((x.float() + b * s.float()) + c * z)
"""
C = """
#include <stdint.h>
void langevin(const float *x, const float *s, const float *z, const float *coef, float *out,
              int64_t rows, int64_t size, int64_t step) {
    for (int64_t i = 0; i < rows * size; i++) {
        const float *c = coef + i / size * step;
        out[i] = (c[0] * x[i] + c[1] * s[i]) + c[2] * z[i];
    }
}
"""
CTYPES = """
import ctypes
from pathlib import Path
library = ctypes.CDLL(str(Path(__file__).parent / "kernel.so"))
def langevin(x, s, z, coef, out):
    pointers = [ctypes.c_void_p(t.ctypes.data) for t in (x, s, z, coef, out)]
    sizes = len(x), x[:1].size, 3 if coef.ndim > 1 else 0
    library.langevin(*pointers, *map(ctypes.c_int64, sizes))
"""
TRITON = """
import torch, triton
import triton.language as tl
ARRAYS = "torch"
@triton.jit
def kernel(x, s, z, coef, out, n, size, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    c = coef + i // size * step
    a, b, d = (tl.load(c, mask), tl.load(c + 1, mask), tl.load(c + 2, mask))
    r = (a * tl.load(x + i, mask) + b * tl.load(s + i, mask)) + d * tl.load(z + i, mask)
    tl.store(out + i, r, mask)
def langevin(x, s, z, coef, out):
    if x.numel():
        step = 3 if coef.ndim > 1 else 0
        kernel[triton.cdiv(x.numel(), 4096),](x, s, z, coef, out, x.numel(), x[:1].numel(), step,
                                              BLOCK=4096)
"""
JAX = """
import jax.numpy as jnp
def langevin(x, s, z, coef):
    a, b, c = (k.reshape(-1, *[1] * (x.ndim - 1)) for k in jnp.moveaxis(jnp.asarray(coef), -1, 0))
    return (a * jnp.asarray(x) + b * jnp.asarray(s)) + c * jnp.asarray(z)
"""
NUMBA = """
import numba, numpy as np
from minidiff import noise
LOG, SIN, COS, SCALE = (np.float32(c) for c in (noise.LOG, noise.SIN, noise.COS, noise.LOG_SCALE))
f32, f64, u32, u64 = numba.float32, numba.float64, numba.uint32, numba.uint64
@numba.njit(inline="always")
def fma(x, y, z):
    return f32(f64(x) * f64(y) + f64(z))
@numba.njit(inline="always")
def horner(c, x):
    v = c[0]
    for k in range(1, len(c)):
        v = fma(v, x, c[k])
    return v
@numba.njit
def philox(c0, c1, c2, c3, k0, k1):
    for _ in range(10):
        p, q = u64(0xD2511F53) * u64(c0), u64(0xCD9E8D57) * u64(c2)
        high, low = u32(q >> u64(32)), u32(p >> u64(32))
        c0, c1, c2, c3 = u32(high ^ c1 ^ k0), u32(q), u32(low ^ c3 ^ k1), u32(p)
        k0, k1 = u32(k0 + u32(0x9E3779B9)), u32(k1 + u32(0xBB67AE85))
    return u32(c0), u32(c1), u32(c2), u32(c3)
@numba.njit
def normals(out, quads, k0, k1, sample, step, tag):
    one = np.empty(1, np.int32)
    for row in range(len(out)):
        for quad in range(quads):
            w = philox(u32(quad), u32(sample + u64(row)), step, tag, k0, k1)
            for k in (0, 2):
                one[0] = np.float32(f32(w[k])).view(np.int32)
                i = one[0]
                m = (i & 0x7FFFFF) | 0x4F000000
                t = f32(2.) - np.int32(m).view(np.float32) * f32(2.**-31)
                e = min(max(m - i, 0), 1 << 28)
                v = fma(SCALE, f32(e), fma(t * t, horner(LOG, t), t))
                r = f32(np.sqrt(f64(v)))
                angle = np.int32(w[k + 1] & u32(0x7FFFFE)) | np.int32(0x40000001)
                g = np.int32(angle).view(np.float32) - f32(3.)
                y = g * g
                sin, cos = horner(SIN, y) * g, horner(COS, y)
                if w[k + 1] & u32(0x40000000):
                    sin, cos = cos, sin
                if w[k + 1] & u32(0x80000000):
                    r = -r
                out[row, 4 * quad + k] = r * cos
                out[row, 4 * quad + k + 1] = r * sin
def normal(shape, seed, sample, step, tag):
    size = int(np.prod(shape[1:]))
    out = np.empty((shape[0], -(-size // 4) * 4), np.float32)
    low = 0xFFFFFFFF
    normals(out, out.shape[1] // 4, u32(seed & low), u32(seed >> 32), u64(sample), u32(step),
            u32(tag))
    return out[:, :size].reshape(shape)
def langevin(x, s, coef, seed, sample, step, tag):
    z = normal(x.shape, seed, sample, step, tag)
    a, b, c = (k.reshape(-1, *[1] * (x.ndim - 1)) for k in np.moveaxis(coef, -1, 0))
    return (a * x + b * s) + c * z
"""
GOOD = {"numpy": NUMPY, "torch": TORCH, "ctypes": CTYPES, "triton": TRITON, "jax": JAX,
        "numba": NUMBA}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_kernel_passes(name, tmp_path, capsys):
    if name in ("triton", "jax", "numba"):
        pytest.importorskip(name)
    (tmp_path / "kernel.c").write_text(C)
    if name == "ctypes":
        subprocess.run([os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-ffp-contract=off",
                        "-o", tmp_path / "kernel.so", tmp_path / "kernel.c"], check=True)
    file = tmp_path / "good.py"
    file.write_text(GOOD[name])
    dtypes = ["float32", "bfloat16"] if name == "torch" else ["float32"]
    # XLA flushes subnormal numbers on a CPU, whatever it is told: all else is the same
    near = Near(rtol=1e-37) if name == "jax" else None
    rows = list(check([file], dtypes=dtypes, seed=3, near=near))
    assert [said(row) for row in rows if not row["passed"]] == []
    shapes = {tuple(row["shape"]) for row in rows}
    assert {(70_001, 3), (1, 2**17 + 3), (1025, 1024), (64, 37)} <= shapes
    notes = " ".join(row["reason"] for row in rows)
    assert ("special values" in notes) == (near is None) and "calls more" in notes
    assert ("in place" in notes) == (name in ("torch", "ctypes", "triton"))
    if name == "jax":
        rows = [row for row in rows if "subnormal" not in row["reason"]]
    assert all(row["max_ulp"] in (0, None) for row in rows)


# ---- 16 bits, clips, sums ----

MORE = HEAD + """
ARRAYS = "torch"
import torch
def columns(x, coef):
    return [k.reshape(-1, *[1] * (x.ndim - 1)) for k in coef.unbind(-1)]
def langevin_v1(x, s, z, coef):
    r = right(x.float(), s.float(), z, coef)
    return (r.view(torch.int32) & -65536).view(torch.float32).bfloat16()
def langevin_v2(x, s, z, coef):
    a, b, c = (k.to(x.dtype) for k in columns(x, coef))
    return (a * x + b * s) + c * z.to(x.dtype)
def langevin_v3(x, s, z, coef):
    r = right(x.float(), s.float(), z, coef)
    i = r.view(torch.int32)
    return torch.where(r.isfinite(), (i + 0x8000 & -65536).view(torch.float32), r).bfloat16()
def ddpm_clipped_v1(x, s, z, coef, clip):
    return clipped(x, s, z, coef, clip, lambda d, lo, hi: d.clamp(-1., 1.))
def ddpm_clipped_v2(x, s, z, coef, clip):
    def clip_it(d, lo, hi):
        return torch.fmin(torch.fmax(d, lo), hi)
    return clipped(x, s, z, coef, clip, clip_it)
def ddpm_clipped_v3(x, s, z, coef, clip):
    clip *= 1.5
    return clipped(x, s, z, coef, clip, torch.clamp)
def clipped(x, s, z, coef, clip, how):
    a, b, c = columns(x, coef)
    p0, p1, lo, hi = columns(x, clip)
    d = how(p0 * x.float() + p1 * s.float(), lo, hi)
    return ((a * x.float() + b * d) + c * z).to(x.dtype)
def noise_norms_v1(shape, seed, sample, step, tag):
    z = noise.normal(shape, seed & 0xFFFFFFFF, sample, step, tag)
    return np.sqrt((z.astype(float)**2).sum(tuple(range(1, z.ndim)))).astype("f")
def noise_norms_v2(x, keys, step, tag):
    z = noise.normal(tuple(x.shape), keys[:, 0].numpy() * 0 + 7, keys[:, 1].numpy(), step, tag)
    return np.sqrt((z.astype(float)**2).sum(tuple(range(1, z.ndim)))).astype("f")
def dsm_loss_v1(s, z, coef):
    e = right(s, s, z, torch.stack((coef[:, 0], coef[:, 0] * 0, coef[:, 1]), 1))
    return (coef[:, 2] * e.square().flatten(1).sum(1)).sum(), e
"""


@pytest.mark.parametrize("name, dtype, words", [
    ("langevin_v1", "bfloat16", "truncated, not rounded"),
    ("langevin_v2", "bfloat16", "computed in bfloat16"),
    ("langevin_v3", "bfloat16", "ties rounded away"),
    ("ddpm_clipped_v1", "float32", "elements differ"),
    ("ddpm_clipped_v2", "float32", "NaN lost in the clip"),
    ("ddpm_clipped_v3", "float32", "changed clip"),
    ("noise_norms_v1", "float32", "high word of the seed"),
    ("noise_norms_v2", "float32", "cannot be|elements differ"),
    ("dsm_loss_v1", "float32", "gradient: .*differ")])
def test_a_wrong_kernel_of_another_op_is_refused(name, dtype, words, tmp_path, monkeypatch):
    monkeypatch.setattr(apart, "BEYOND", [(300, 5)])
    file = tmp_path / "more.py"
    body = re.sub(r"(?ms)^def \w+_v\d\(.*?(?=^def |\Z)",
                  lambda m: m[0] if f"def {name}(" in m[0] else "", MORE)
    file.write_text(body)
    failed = [row for row in check([file], dtypes=[dtype]) if not row["passed"]]
    assert any(re.search(words, said(row)) for row in failed), failed[:1]


# ---- what a command takes and says ----

def test_seeds_are_secret_told_and_repeat_a_run(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("import numpy as np\ndef langevin(x, s, z, coef): return x")
    one = "check", "--kernel", str(file), "--shape", "2,3"
    shown = []
    for more in ([], [], ["--seed", "7"], ["--seed", "7"], ["--seed", str(2**64 + 7)]):
        assert main([*one, *more]) == 1
        shown.append(capsys.readouterr().out)
    assert len({*shown[:3]}) == 3 and shown[2] == shown[3]
    assert shown[4].split("--seed")[0] == shown[2].split("--seed")[0]
    assert main([*one, "--seed", re.search(r"--seed (\d+)", shown[0])[1]]) == 1
    assert capsys.readouterr().out == shown[0]


def test_check_goes_where_a_failure_is(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(NUMPY)
    json_file = tmp_path / "rows.json"
    assert main(["check", "--kernel", str(file), "--shape", "2,3,4", "--elements", "70",
                 "--dtype", "float16", "--dtype", "float32", "--json", str(json_file)]) == 1
    rows = json.loads(json_file.read_text())
    assert {tuple(r["shape"]) for r in rows} == {(2, 3, 4), (1, 70)}
    assert {r["dtype"] for r in rows} == {"float16", "float32"}
    assert {r["dtype"] for r in rows if not r["passed"]} == {"float16"}  # returned float32
    assert main(["check", "--op", "langevin", "--backend", "torch", "--shape", "2,3"]) == 0


@pytest.mark.parametrize("argv, words", [
    (["--kernel", ""], ["--kernel ''", "not a file"]),
    (["--ulp", "1"], ["--ulp", "--kernel"]),
    (["--kernel", "no.py"], ["no.py", "not a file"]),
    (["--op", "langevin", "--shape", "99999999999,99999"], ["memory"])])
def test_check_options_that_cannot_be(argv, words, refused):
    refused(*words, argv=["check", *argv])


def test_near_is_near_and_never_the_same(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(NUMPY.replace("return (a * x + b * s) + c * z",
                                  "return a * x + (b * s + c * z)"))
    one = "check", "--kernel", str(file), "--op", "langevin", "--shape", "7,4", "--seed", "1"
    assert main([*one]) == 1
    assert main([*one, "--ulp", str(2**20)]) == main([*one, "--rtol", "1e-6"]) == 0
    out = capsys.readouterr().out
    assert f"within {2**20} ulp: at most" in out and "within rtol 1e-06: at most" in out
    assert main([*one, "--rtol", "1e-9"]) == 1
    for options, bits in ((["--rtol", "1e-5"], "rtol 1e-05"),
                          (["--ulp", str(2**20)], f"{2**20} ulp")):
        assert main(["bench", "--device", "cpu", "--kernel", str(file), "--op", "langevin",
                     "--elements", "4096", *options, "--json", str(tmp_path / "r.json")]) == 0
        out = capsys.readouterr().out
        mine, = [line for line in out.splitlines()
                 if line.startswith("langevin ") and "mine.py" in line]
        assert bits in mine and "same" not in mine
        row, = [r for r in json.loads((tmp_path / "r.json").read_text())
                if "mine.py" in r["backend"]]
        assert row["within"] == bits and row["matches_reference"] is False


def test_near_counts_from_what_was_expected():
    a, b = torch.tensor([1., 2., np.nan, np.inf]), torch.tensor([1., 2. + 2**-22, np.nan, np.inf])
    row = compare("op", "b", "float32", (4,), b, a, near=Near(ulp=1))
    assert row["passed"] and row["within"] == "within 1 ulp" and row["max_ulp"] == 1
    assert not compare("op", "b", "float32", (4,), b + 2**-22, a, near=Near(ulp=1))["passed"]
    assert compare("op", "b", "float32", (4,), b, a, near=Near(rtol=2.**-23))["passed"]
    assert not compare("op", "b", "float32", (4,), b, a, near=Near(rtol=2.**-25))["passed"]
    assert not compare("op", "b", "float32", (4,), b * 0, a, near=Near(rtol=.9))["passed"]
    for other in (torch.nan, 3e38, 5.):
        far = torch.tensor([1., 2., np.nan, other])
        assert not compare("op", "b", "float32", (4,), far, a, near=Near(2**20, .1))["passed"]
    assert not compare("op", "b", "float32", (4,), a * torch.nan, a, near=Near(2**32))["passed"]


def test_several_files_and_versions(tmp_path, capsys):
    (tmp_path / "helper.py").write_text(NUMPY.replace("langevin", "mine"))
    for name in ("a", "b"):
        version = {"a": "v1", "b": "v12"}[name]
        (tmp_path / f"{name}.py").write_text(
            f"import helper\nlangevin_{version} = langevin = helper.mine\n"
            "langevin_kernel = langevin_v = helper.mine\n")
    files = [str(tmp_path / f"{name}.py") for name in "ab"]
    options = [text for file in files for text in ("--kernel", file)]
    assert main(["check", *options, "--shape", "3,5", "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    assert {r["backend"] for r in rows} == {*files, f"{files[0]}:langevin_v1",
                                            f"{files[1]}:langevin_v12"}
    assert main(["bench", "--device", "cpu", *options, "--elements", "1024", "--json",
                 str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    assert {*files, f"{files[0]}:langevin_v1"} <= {r["backend"] for r in rows}


def test_arrays_of_any_library(tmp_path):
    """By __dlpack__, or by __array__ where that is all there is."""
    (tmp_path / "mine.py").write_text(NUMPY + """
class Array:
    def __init__(self, array):
        self.array = array
class Packed(Array):
    def __dlpack__(self, **kw): return self.array.__dlpack__(**kw)
    def __dlpack_device__(self): return self.array.__dlpack_device__()
class Plain(Array):
    def __array__(self, dtype=None, copy=None): return self.array
right = langevin
def langevin_v1(x, s, z, coef): return Packed(right(x, s, z, coef))
def langevin_v2(x, s, z, coef): return Plain(right(x, s, z, coef))
def langevin_v3(x, s, z, coef): return Array(right(x, s, z, coef))
""")
    rows = list(check([tmp_path / "mine.py"], ["langevin"], shapes=[(3, 5), (0, 2)]))
    failed = {row["backend"][-2:] for row in rows if not row["passed"]}
    assert failed == {"v3"} and "returned a Array" in rows[-1]["reason"]


def test_what_a_kernel_prints_is_shown_up_to_a_limit(tmp_path, capfd):
    (tmp_path / "mine.py").write_text(NUMPY + "print('hello')\nprint('x' * 10**7)\n")
    assert main(["check", "--kernel", str(tmp_path / "mine.py"), "--shape", "3,5"]) == 0
    out, err = capfd.readouterr()
    assert "hello" in err and "prints more, which is not shown" in err and len(err) < 5000
    assert "xxx" not in out


@pytest.mark.parametrize("code, words", [
    ("import os; os._exit(0)", "its import ended its process with exit status 0"),
    ("import ctypes; ctypes.string_at(0)", "its import crashed in .*mine.py, line 1 .SIGSEGV"),
    ("import time; time.sleep(60)", "its import takes more than 6 s"),
    ("x = 1\n1 / 0", "ZeroDivisionError: division by zero .*mine.py, line 2"),
    ("def f(:", "SyntaxError.*line 1")])
def test_a_file_that_ends_its_process_is_one_line(code, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(apart, "START", 6.)
    (tmp_path / "mine.py").write_text(code)
    assert main(["check", "--kernel", str(tmp_path / "mine.py")]) == 2
    err = capsys.readouterr().err
    assert re.search(words, err) and err.count("\n") == 1
    assert main(["bench", "--device", "cpu", "--kernel", str(tmp_path / "mine.py")]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_nothing_is_left_running(tmp_path):
    """A kernel's own processes end with it."""
    (tmp_path / "mine.py").write_text(NUMPY + f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
""")
    list(check([tmp_path / "mine.py"], ["langevin"], shapes=[(3, 5)]))
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_bench_times_no_interpreter(tmp_path, refused):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("it is compiled there")
    (tmp_path / "mine.py").write_text(TRITON)
    refused("mine.py", "right in Triton's interpreter", "nothing was timed", argv=[
        "bench", "--device", "cpu", "--kernel", str(tmp_path / "mine.py"), "--elements", "1024"])


def test_what_is_slow_in_the_interpreter_is_not_called_passed(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(apart, "PATIENCE", .5)
    monkeypatch.setattr(apart, "BEYOND", [(70_001, 3)])
    (tmp_path / "mine.py").write_text(TRITON.replace("def langevin", """
def langevin(x, s, z, coef, out):
    block = 4 if x.numel() > 100_000 else 4096
    return run(x, s, z, coef, out, block)
def run""").replace("coef, out):\n    if", "coef, out, block):\n    if").replace(
        "BLOCK=4096", "BLOCK=block").replace(", 4096)", ", block)"))
    rows = list(check([tmp_path / "mine.py"]))
    large = [row for row in rows if row["shape"] == [70_001, 3]]
    if not torch.cuda.is_available():
        assert {row["passed"] for row in large} == {None}
        assert all("--shape 70001,3" in row["reason"] for row in large)
    assert all(row["passed"] for row in rows if row not in large)


@pytest.mark.parametrize("argv, words", [
    (["--shape", "3,,5"], "as 3,5"), (["--shape", "a"], "as 3,5"),
    (["--ulp", "0"], "at least 1"), (["--ulp", str(2**21)], "at most 2^20"),
    (["--rtol", "2"], "between 0 and 1"),
    (["--elements", "0"], "at least 1")])
def test_option_values_that_cannot_be(argv, words, capsys):
    with pytest.raises(SystemExit):
        main(["check", *argv])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["flushed", "minus zero", "zero skipped"])
def test_a_shape_is_tried_on_all_that_fails(kind, tmp_path):
    (tmp_path / "mine.py").write_text(source({kind: WRONG[kind]}))
    failed = [r for r in check([tmp_path / "mine.py"], shapes=[(16, 37)]) if not r["passed"]]
    assert any(re.search(WRONG[kind][2], said(row)) for row in failed)


def test_what_is_imported_from_here_is_nobodys_kernel(tmp_path, refused):
    (tmp_path / "mine.py").write_text("from minidiff.noise import normal\n")
    refused("no function named like an op", argv=["check", "--kernel", str(tmp_path / "mine.py")])


@pytest.mark.parametrize("arguments", ["*x", "x, /, s", "", "**x"])
def test_arguments_are_named(arguments, tmp_path, refused):
    (tmp_path / "mine.py").write_text(f"def langevin({arguments}): return x")
    refused("langevin must name each argument", argv=["check", "--kernel",
                                                      str(tmp_path / "mine.py")])


def test_each_file_has_its_own_helper(tmp_path):
    """Two folders with a module of one name: in bench they share a process."""
    for k in (1, 2):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "helper.py").write_text(f"NUMBER = {k}")
        (tmp_path / str(k) / "mine.py").write_text("import helper\ndef norms(x): "
                                                   "return x + helper.NUMBER")
    found = UserKernels(tmp_path / "1" / "mine.py", tmp_path / "2" / "mine.py").functions
    assert [f.call(0) for f in found] == [1, 2]


def test_out_of_norms_is_as_long_as_the_batch(tmp_path):
    (tmp_path / "mine.py").write_text("""
import numpy as np
def norms(x, out):
    out[...] = np.sqrt((x.reshape(len(x), -1).astype(float)**2).sum(1))
""")
    assert all(row["passed"] for row in check([tmp_path / "mine.py"], shapes=[(3, 5), (4, 2, 2)]))

"""Right kernels pass, in whatever language and with whatever arrays."""

import os
import subprocess

import pytest
import torch
from kernel_files import NUMPY, TRITON, said

from minidiff.kernels.check.compare import Near
from minidiff.kernels.check.yours import apart
from minidiff.kernels.check.yours.apart import check

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


def test_out_of_norms_is_as_long_as_the_batch(tmp_path):
    (tmp_path / "mine.py").write_text("""
import numpy as np
def norms(x, out):
    out[...] = np.sqrt((x.reshape(len(x), -1).astype(float)**2).sum(1))
""")
    assert all(row["passed"] for row in check([tmp_path / "mine.py"], shapes=[(3, 5), (4, 2, 2)]))


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

"""The raw words of each backend's Philox, for the known answers: no kernel of use returns them."""

import ctypes

import numpy as np

from .. import noise
from ..kernels import driver, on_cupy, on_host, on_triton

WORDS = """
#ifdef __CUDACC_RTC__
#define GLOBAL __global__
#define EACH(i, n) i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; if (i < n)
#else
#define GLOBAL
#define EACH(i, n) for (i64 i = 0; i < n; i++)
#endif
extern "C" GLOBAL void words(const u32 *counters, u32 *out, i64 n, u32 k0, u32 k1) {
    EACH(i, n) {
        u64 c[4];
        for (int k = 0; k < 4; k++) c[k] = counters[4 * i + k];
        philox(c[0], c[1], c[2], c[3], k0, k1);
        for (int k = 0; k < 4; k++) out[4 * i + k] = (u32)c[k];
    }
}
"""


def _numpy(counters, key):
    return np.stack(noise.philox(counters.T, key), -1)


def _torch(counters, key):
    import torch
    words = torch.from_numpy(counters.astype(np.int64)).unbind(1)
    return torch.stack(noise.philox(words, key), 1).numpy().astype(np.uint32)


def _host(counters, key):
    counters = np.ascontiguousarray(counters)
    out = np.empty_like(counters)
    words = on_host.library(on_host.macros("float32", 0, 1, 0), on_host.NATIVE, WORDS).words
    words.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] + [ctypes.c_uint32] * 2
    words(counters.ctypes.data, out.ctypes.data, len(out), *key)
    return out


def _words_of(backend, counters, launch):
    """What launch(counters, out) writes, int32 tensors where the backend takes them."""
    import torch
    c = torch.from_numpy(counters.view(np.int32)).to(backend.TAKES)
    out = torch.empty_like(c)
    launch(c, out)
    return out.cpu().numpy().view(np.uint32)


def _cupy(counters, key):
    def launch(c, out):
        kernel = on_cupy.compiled(c.device, ("float32", 0, True, False), "words", WORDS)
        blocks = -(-len(c) // on_cupy.THREADS)
        numbers = np.int64(len(c)), *map(np.uint32, key)
        driver.prepare(c.device, kernel, blocks, (c, out, *numbers))()
    return _words_of(on_cupy, counters, launch)


def _triton(counters, key):
    block = 1 << 16 if on_triton.INTERPRET else 256
    return _words_of(on_triton, counters, lambda c, out: _words[(-(-len(c) // block),)](
        c, out, len(c), *map(on_triton.signed, key), BLOCK=block, enable_fp_fusion=False))


def triton_radius(w):
    """on_triton.radius of uint32 words, NumPy in and out."""
    return _words_of(on_triton, w, lambda w, out: _radii[(-(-len(w) // 1024),)](
        w, out, len(w), INTERPRETED=on_triton.INTERPRET, BLOCK=1024,
        enable_fp_fusion=False)).view(np.float32)


if on_triton.triton:
    import triton
    import triton.language as tl

    from ..kernels.on_triton import philox as triton_philox
    from ..kernels.on_triton import radius

    @triton.jit(do_not_specialize=["n", "k0", "k1"])
    def _words(counters, out, n, k0, k1, BLOCK: tl.constexpr):
        i = 4 * (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
        c0 = tl.load(counters + i, mask=i < 4 * n).to(tl.uint32)
        c1 = tl.load(counters + i + 1, mask=i < 4 * n).to(tl.uint32)
        c2 = tl.load(counters + i + 2, mask=i < 4 * n).to(tl.uint32)
        c3 = tl.load(counters + i + 3, mask=i < 4 * n).to(tl.uint32)
        c0, c1, c2, c3 = triton_philox(c0, c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))
        tl.store(out + i, c0.to(tl.int32, bitcast=True), mask=i < 4 * n)
        tl.store(out + i + 1, c1.to(tl.int32, bitcast=True), mask=i < 4 * n)
        tl.store(out + i + 2, c2.to(tl.int32, bitcast=True), mask=i < 4 * n)
        tl.store(out + i + 3, c3.to(tl.int32, bitcast=True), mask=i < 4 * n)

    @triton.jit(do_not_specialize=["n"])
    def _radii(words, out, n, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(words + i, mask=i < n).to(tl.uint32)
        tl.store(out + i, radius(w, INTERPRETED).to(tl.int32, bitcast=True), mask=i < n)


def philox(name, counters, key):
    """The words of (n, 4) uint32 counters on a backend, (n, 4)."""
    return {"numpy": _numpy, "torch": _torch, "host": _host, "cupy": _cupy,
            "triton": _triton}[name](counters, key)

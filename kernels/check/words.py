"""The noise stage by stage on each backend: words, then radius, cos and sin, then two
normals.

No kernel of use returns these. A kernel's author compares stage by stage where the normals
differ.
"""

import ctypes

import numpy as np
import torch

from ... import noise
from .. import driver, on_cupy, on_host, on_triton, update
from .compare import row_of, ulps

ANSWERS = (  # Random123's known answers: counter, key, words
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)))
STAGES = "radius", "cos", "sin", "z0", "z1"
SOURCE = """
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
extern "C" GLOBAL void stages(const u32 *words, float *out, i64 n) {
    EACH(i, n) {
        u32 even = words[2 * i], odd = words[2 * i + 1];
        out[5 * i] = radius(even);
        cos_sin(odd, out[5 * i + 1], out[5 * i + 2]);
        pair(even, odd, out[5 * i + 3], out[5 * i + 4]);
    }
}
"""


def launched(backend, given, width, launch):
    """What launch(tensor, out) writes: (n, width) words of (n, ...) given words."""
    tensor = torch.from_numpy(np.ascontiguousarray(given).view(np.int32)).to(backend.TAKES)
    out = torch.empty((len(given), width), dtype=torch.int32, device=tensor.device)
    launch(tensor, out)
    return out.cpu().numpy().view(np.uint32)


def on_a_host(name, given, width, *numbers):
    """A function of SOURCE, compiled for the CPU."""
    given, out = np.ascontiguousarray(given), np.empty((len(given), width), np.uint32)
    library = on_host.library(on_host.macros("float32", 0, 1, 0), on_host.native(), SOURCE)
    getattr(library, name)(*(ctypes.c_void_p(a.ctypes.data) for a in (given, out)),
                           ctypes.c_int64(len(out)), *numbers)
    return out


def raw(source, name, blocks, *arguments):
    """Launch a kernel of `source`, compiled by NVRTC beside kernels.cu."""
    device = arguments[0].device
    kernel = on_cupy.compiled(device, (True, "float32", 0, True, False), name, source)
    driver.prepare(device, kernel, blocks, arguments)()


def by_cupy(name, given, width, *numbers):
    """A kernel of SOURCE on a GPU."""
    def launch(tensor, out):
        blocks = -(-len(out) // on_cupy.THREADS)
        raw(SOURCE, name, blocks, tensor, out, ctypes.c_int64(len(out)), *numbers)
    return launched(on_cupy, given, width, launch)


def by_triton(kernel, given, width, *numbers):
    """One of Triton's two kernels below."""
    block = 1 << 16 if on_triton.INTERPRET else 256

    def launch(tensor, out):
        blocks = -(-len(out) // block)
        kernel[blocks,](tensor, out, len(out), *numbers, BLOCK=block, enable_fp_fusion=False)
    return launched(on_triton, given, width, launch)


def philox(name, counters, key):
    """The words of (n, 4) uint32 counters on a backend, (n, 4)."""
    if name == "numpy":
        return np.stack(noise.philox(counters.T, key), -1)
    if name == "torch":
        words = torch.from_numpy(counters.astype(np.int64)).unbind(1)
        return torch.stack(noise.philox(words, key), 1).numpy().astype(np.uint32)
    if name == "triton":
        return by_triton(_words, counters, 4, *map(on_triton.signed, key))
    how = on_a_host if name == "host" else by_cupy
    return how("words", counters, 4, *map(ctypes.c_uint32, key))


def stages(name, words):
    """STAGES of (n, 2) uint32 words, an even and an odd one, on a backend: (n, 5)
    float32."""
    if name in ("numpy", "torch"):
        xp = np if name == "numpy" else torch
        w = xp.asarray(words.astype(np.int64))
        parts = noise.radius(w[:, 0], xp), *noise.cos_sin(w[:, 1], xp), \
            *noise.to_normal(w, xp).T
        return np.stack([np.asarray(p) for p in parts], -1)
    if name == "triton":
        return by_triton(_stages, words, 5).view(np.float32)
    how = on_a_host if name == "host" else by_cupy
    return how("stages", words, 5).view(np.float32)


def every_word():
    """(n, 2) words: each float32 that an even word can become; each angle, quarter and
    sign."""
    even = [np.arange(2**24), *(np.arange(2**k, 2**(k + 1), 2**(k - 23)) for k in range(24, 32)),
            [2**32 - 1]]
    even = np.concatenate(even).astype(np.uint32)
    k = np.arange(len(even), dtype=np.uint32)
    return np.stack((even, (k & 0x3FFFFF) << 1 | (k >> 22 & 3) << 30), -1)


def check_words(name, n=100_000):
    """The noise's stages on a backend, n random ones against NumPy's: Philox, with its
    known answers, then the words' radii, cosines, sines and normals, bit for bit."""
    rng, key = np.random.default_rng(1), (0x9ABCDEF0, 0x12345678)
    counters = rng.integers(0, 2**32, (n, 4), np.uint32)
    good = all((philox(name, np.array([c], np.uint32), k)[0] == w).all()
               for c, k, w in ANSWERS)
    same = (philox(name, counters, key) == philox("numpy", counters, key)).all()
    reason = "Random123's answers and random counters"
    if not good:
        reason = "Random123's answers differ"
    elif not same:
        reason = "random counters differ from NumPy's"
    yield row_of("philox", name, "uint32", counters.shape, bool(good and same), reason)
    words = counters[:, :2]
    distance = ulps(stages(name, words), stages("numpy", words)).max(0)
    wrong = [f"{stage} by {d} ulp" for stage, d in zip(STAGES, distance) if d]
    reason = f"off NumPy's: {', '.join(wrong)}" if wrong else "radius, cos, sin and two normals"
    yield row_of("stages", name, "float32", words.shape, not wrong, reason, int(distance.max()))


def shown(seed=0, sample=7, step=3, tag=noise.CORRECTOR):
    """Every stage of one counter's four elements, in hexadecimal and decimal, down to an
    update of theirs: what a kernel's author compares when the normals differ."""
    counter = {"seed": seed, "sample": sample, "step": step, "tag": tag}
    words = noise.words((1, 4), **counter).reshape(2, 2)
    coef = np.array([.5, 2., .25], np.float32)
    x, s = np.full((1, 4), 1., np.float32), np.full((1, 4), -.5, np.float32)
    out = update([x, s], coef, backend="numpy", **counter).reshape(2, 2)
    lines = [f"seed {seed}, sample {sample}, step {step}, tag {tag}, elements 0 to 3"]
    lines += [line(f"word {k}", word) for k, word in enumerate(words.ravel().astype(np.uint32))]
    for k, found in enumerate(stages("numpy", words.astype(np.uint32))):
        even, odd = 2 * k, 2 * k + 1
        names = f"radius of word {even}", f"cos of word {odd}", f"sin of word {odd}", \
            f"z{even}", f"z{odd}"
        lines += map(line, names, found)
        lines += map(line, (f"update with z{even}", f"update with z{odd}"), out[k])
    return "\n".join([*lines, "update: (0.5 x + 2 s) + 0.25 z at x = 1, s = -0.5"])


def line(name, value):
    """A stage's name, its 32 bits and its value."""
    return f"  {name:<18}{int(value.view(np.uint32)):08x}  {value!s:>14}"


if on_triton.triton:
    import triton
    import triton.language as tl

    from ..on_triton import cos_sin, pair, radius
    from ..on_triton import philox as triton_philox

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
    def _stages(words, out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        even = tl.load(words + 2 * i, mask=i < n).to(tl.uint32)
        odd = tl.load(words + 2 * i + 1, mask=i < n).to(tl.uint32)
        r = radius(even)
        c, s = cos_sin(odd)
        z0, z1 = pair(even, odd)
        tl.store(out + 5 * i, r.to(tl.int32, bitcast=True), mask=i < n)
        tl.store(out + 5 * i + 1, c.to(tl.int32, bitcast=True), mask=i < n)
        tl.store(out + 5 * i + 2, s.to(tl.int32, bitcast=True), mask=i < n)
        tl.store(out + 5 * i + 3, z0.to(tl.int32, bitcast=True), mask=i < n)
        tl.store(out + 5 * i + 4, z1.to(tl.int32, bitcast=True), mask=i < n)

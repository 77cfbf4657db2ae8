"""The noise stage by stage on each backend: words, then radius, cos and sin, then two
normals.

No kernel of use returns these. A kernel's author compares stage by stage where the normals
differ: `check_words` does it for the backends here, `shown` prints one counter's stages.
"""

import ctypes

import numpy as np
import torch

from ... import noise
from .. import driver, on_cupy, on_host, on_triton, update
from .compare import row_of, ulps

ANSWERS = (  # Random123's known answers: counter, key, words
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
STAGES = "radius", "cos", "sin", "z0", "z1"


def check_words(backend, n=100_000):
    """Two rows: a backend's Philox, and the stages of its noise, against NumPy's.

    n random counters for each, bit for bit. Philox must also give its known answers.
    """
    rng = np.random.default_rng(1)
    counters = rng.integers(0, 2**32, (n, 4), np.uint32)
    yield philox_row(backend, counters)
    yield stages_row(backend, counters[:, :2])


def philox_row(backend, counters):
    """A row of Philox on a backend: Random123's answers and (n, 4) uint32 counters."""
    key = 0x9ABCDEF0, 0x12345678
    good = all(gives(backend, *answer) for answer in ANSWERS)
    same = np.array_equal(philox(backend, counters, key),
                          philox("numpy", counters, key))
    reason = "Random123's answers and random counters"
    if not good:
        reason = "Random123's answers differ"
    elif not same:
        reason = "random counters differ from NumPy's"
    passed = good and same
    return row_of("philox", backend, "uint32", counters.shape, passed, reason)


def gives(backend, counter, key, words):
    """Whether a backend's Philox makes these words of one counter."""
    counters = np.array([counter], np.uint32)
    return philox(backend, counters, key).tolist() == [list(words)]


def stages_row(backend, words):
    """A row of STAGES on a backend, of (n, 2) uint32 words: bit for bit NumPy's."""
    off = ulps(stages(backend, words), stages("numpy", words))
    worst = off.max(0)
    wrong = [f"{stage} by {d} ulp" for stage, d in zip(STAGES, worst) if d]
    reason = "radius, cos, sin and two normals"
    if wrong:
        reason = f"off NumPy's: {', '.join(wrong)}"
    return row_of("stages", backend, "float32", words.shape, not wrong, reason,
                  max_ulp=int(worst.max()))


# ---- one counter, for a kernel's author ----

def shown(seed=0, sample=7, step=3, tag=noise.CORRECTOR):
    """Every stage of one counter's four elements, down to an update of theirs, as text.

    Each is in hexadecimal and decimal. A kernel's author compares them when the normals
    differ.
    """
    counter = {"seed": seed, "sample": sample, "step": step, "tag": tag}
    words = noise.words((1, 4), **counter).astype(np.uint32)
    lines = [f"seed {seed}, sample {sample}, step {step}, tag {tag}, elements 0 to 3"]
    lines += [line(f"word {k}", word) for k, word in enumerate(words.ravel())]

    x = np.full((1, 4), 1., np.float32)
    s = np.full((1, 4), -.5, np.float32)
    coef = np.array([.5, 2., .25], np.float32)
    out = update([x, s], coef, backend="numpy", **counter)

    pairs = words.reshape(2, 2)
    found = np.hstack((stages("numpy", pairs), out.reshape(2, 2)))
    for k, values in enumerate(found):
        even = 2 * k
        odd = even + 1
        names = [f"radius of word {even}", f"cos of word {odd}", f"sin of word {odd}",
                 f"z{even}", f"z{odd}", f"update with z{even}", f"update with z{odd}"]
        lines += map(line, names, values)
    lines.append("update: (0.5 x + 2 s) + 0.25 z at x = 1, s = -0.5")
    return "\n".join(lines)


def line(name, value):
    """A stage's name, its 32 bits and its value."""
    return f"  {name:<18}{int(value.view(np.uint32)):08x}  {value!s:>14}"


# ---- the stages on a backend ----

def philox(backend, counters, key):
    """The words of (n, 4) uint32 counters on a backend, (n, 4)."""
    if backend == "numpy":
        return np.stack(noise.philox(counters.T, key), -1)
    if backend == "torch":
        tensor = torch.from_numpy(counters.astype(np.int64))
        words = noise.philox(tensor.unbind(1), key)
        return torch.stack(words, 1).numpy().astype(np.uint32)
    if backend == "triton":
        return by_triton(_words, counters, 4, *(noise.signed(k, 32) for k in key))
    run = by_host if backend == "host" else by_cupy
    return run("words", counters, 4, *map(ctypes.c_uint32, key))


def stages(backend, words):
    """STAGES of (n, 2) uint32 words on a backend, (n, 5) float32.

    A row of words is an even one, which gives the radius, and an odd one, the angle.
    """
    if backend in ("numpy", "torch"):
        return by_reference(np if backend == "numpy" else torch, words)
    if backend == "triton":
        return by_triton(_stages, words, 5).view(np.float32)
    run = by_host if backend == "host" else by_cupy
    return run("stages", words, 5).view(np.float32)


def every_word():
    """(n, 2) words that hold every case of the stages.

    The even ones are each float32 that a word can become. The odd ones go through each
    angle, quarter and sign.
    """
    even = [np.arange(2**24)]  # exact as float32
    for k in range(24, 32):
        start = 2**k
        even.append(np.arange(start, 2 * start, 2**(k - 23)))
    even.append([2**32 - 1])  # it becomes 2^32
    even = np.concatenate(even).astype(np.uint32)
    k = np.arange(len(even), dtype=np.uint32)
    angle = (k & 0x3FFFFF) << 1
    quarter_and_sign = (k >> 22 & 3) << 30
    return np.stack((even, angle | quarter_and_sign), -1)


def by_reference(xp, words):
    """STAGES as noise.py computes them, in NumPy or torch."""
    words = xp.asarray(words.astype(np.int64))
    even, odd = words.T
    radius = noise.radius(even, xp)
    cos, sin = noise.cos_sin(odd, xp)
    z0, z1 = noise.to_normal(words, xp).T
    parts = [np.asarray(part) for part in (radius, cos, sin, z0, z1)]
    return np.stack(parts, -1)


def by_host(name, given, width, *numbers):
    """A function of SOURCE, compiled for the CPU. Its words are (n, width)."""
    given = np.ascontiguousarray(given)
    out = np.empty((len(given), width), np.uint32)
    library = on_host.library(on_host.NOISE, on_host.native(), SOURCE)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (given, out)]
    function = getattr(library, name)
    function(*pointers, ctypes.c_int64(len(out)), *numbers)
    return out


def by_cupy(name, given, width, *numbers):
    """A kernel of SOURCE on a GPU. Its words are (n, width)."""
    tensor, out = words_and_room(on_cupy, given, width)
    n = len(out)
    blocks = -(-n // on_cupy.THREADS)
    raw(SOURCE, name, blocks, tensor, out, n, *(number.value for number in numbers))
    return from_device(out)


def raw(source, name, blocks, *arguments):
    """Launch a kernel of `source`, compiled by NVRTC beside kernels.cu."""
    device = arguments[0].device
    variant = (True, "float32", 0, True, False)  # on_host.NOISE's: the smallest that draws
    kernel = on_cupy.compiled(device, variant, name, source)
    driver.prepare(device, kernel, blocks, arguments)()


def by_triton(kernel, given, width, *numbers):
    """One of Triton's two kernels below. Its words are (n, width)."""
    tensor, out = words_and_room(on_triton, given, width)
    n = len(out)
    block = 1 << 16 if on_triton.INTERPRET else 256
    grid = (-(-n // block),)
    kernel[grid](tensor, out, n, *numbers, BLOCK=block, enable_fp_fusion=False)
    return from_device(out)


def words_and_room(backend, given, width):
    """(n, ...) uint32 words where a backend takes them, and room for (n, width) of its."""
    words = np.ascontiguousarray(given).view(np.int32)
    tensor = torch.from_numpy(words).to(backend.TAKES)
    return tensor, tensor.new_empty(len(given), width)


def from_device(out):
    """A tensor's 32-bit words as uint32."""
    return out.cpu().numpy().view(np.uint32)


# What by_host and by_cupy compile, beside the functions of on_host's and on_cupy's source.
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

# What by_triton launches.
if on_triton.triton:
    import triton
    import triton.language as tl

    from ..on_triton import cos_sin, pair, radius
    from ..on_triton import philox as triton_philox

    @triton.jit
    def _load(place, mask):
        return tl.load(place, mask=mask).to(tl.uint32)

    @triton.jit
    def _store(place, word, mask):
        tl.store(place, word.to(tl.int32, bitcast=True), mask=mask)

    @triton.jit(do_not_specialize=["n", "k0", "k1"])
    def _words(counters, out, n, k0, k1, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        counters += 4 * i
        out += 4 * i
        c0 = _load(counters, mask)
        c1 = _load(counters + 1, mask)
        c2 = _load(counters + 2, mask)
        c3 = _load(counters + 3, mask)
        k0 = k0.to(tl.uint32)
        k1 = k1.to(tl.uint32)
        c0, c1, c2, c3 = triton_philox(c0, c1, c2, c3, k0, k1)
        _store(out, c0, mask)
        _store(out + 1, c1, mask)
        _store(out + 2, c2, mask)
        _store(out + 3, c3, mask)

    @triton.jit(do_not_specialize=["n"])
    def _stages(words, out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        even = _load(words + 2 * i, mask)
        odd = _load(words + 2 * i + 1, mask)
        r = radius(even)
        c, s = cos_sin(odd)
        z0, z1 = pair(even, odd)
        out += 5 * i
        _store(out, r, mask)
        _store(out + 1, c, mask)
        _store(out + 2, s, mask)
        _store(out + 3, z0, mask)
        _store(out + 4, z1, mask)

"""Noise as a pure function of (seed, sample, element, step, tag): the bit contract.

A generator with a state gives each number once, in an order that a kernel, a GPU, another
batch size would change. Here a number has a name, and whoever knows the name computes it:
NumPy, a CUDA thread, one process of many, on any day. A reader needs no more of this than
`normal(shape, seed)`; whoever writes a kernel needs all of it:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (quad, sample, step, tag),  quad = j div 4, word = j mod 4
              for element j of a flattened sample; a quad never spans two samples
    rows: row b is (seed, sample + b); or seed and sample are arrays, an integer a row
    words   = Philox4x32-10(counter, key)                                [Philox]
    uniform = float32(word) * 2^-32 + 2^-33, in (0, 1]
    normals: words (w0, w1) -> (z0, z1), (w2, w3) -> (z2, z3)            [Box-Muller]
              r = sqrt(-2 ln u) from the even word, the angle from the odd one

The order, in float32, where fma(x, y, z) is x*y + z rounded once:

    i = bits(float32(w))
    m = (i & 0x7fffff) | 0x4f000000             w's mantissa, as a float in [2^31, 2^32)
    t = 2 - 2^-31 * float_of(m)                 in (0, 1], exact
    e = max(min(m - i, 2^28), 0)                what the exponent lacks to 2^31
    r = sqrt(fma(LOG_SCALE, float32(e), fma(t*t, P(t), t)))
                                                P = LOG, by Horner in fma

    g = float_of((w & 0x7ffffe) | 0x40000001) - 3
                                                an odd multiple of 2^-22
    y = g*g;  sin = S(y) * g;  cos = C(y)       of pi/4 g: S = SIN, C = COS
    bit 30 of w exchanges cos and sin, bit 31 changes r's sign; z0 = r*cos, z1 = r*sin

So u is w / 2^32, but 2^-33 for the word 0, and 1/2 for the last 128 words, which float32
rounds to 2^32. The angle is the middle of one of 2^24 equal parts of a turn. Flipping bit
31 negates both normals and flipping bit 30 exchanges them, so odd moments vanish exactly.
|z| <= 6.7637 is never 0.

Every float operation is a product, a difference, an fma or a square root, and IEEE 754
rounds each correctly. They are done in the order written, and nothing else is contracted.
So any machine that keeps the order returns the same bits. The polynomials' constants belong
to the contract. Next: `affine`, the other half of a kernel.
"""

import reprlib
from operator import index

import numpy as np

from .arguments import require_plain

# What a draw is for. Draws that differ in any of seed, sample, step or tag are independent.
PRIOR = 0  # where a reverse process starts
PERTURBATION = 1  # the noise of training
PREDICTOR = 2  # a sampler's own step
TIME = 3  # the times or levels of training
DATA = 4  # samples of a known distribution
PROBE = 5  # Hutchinson's probes
DEQUANTIZATION = 6  # what is added to grey levels
CHOICE = 7  # a component of a mixture
CHURN = 8  # what raises EDM's noise level
ORDER = 9  # the order of training data
FORWARD = 10  # a forward process
KNOWN = 11  # the noise of known parts
LABEL = 12  # which labels a training does not tell
CORRECTOR = 16  # corrector k draws with tag CORRECTOR + k
TAGS = {tag: name for name, tag in dict(globals()).items()
        if name.isupper()}  # for messages

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
# each constant is a float32; highest power first
LOG = (.005525609944015741, -.012809298001229763, .018886156380176544,
       -.005654762499034405, .01648067869246006, .030460314825177193,
       .08340802788734436, .2499976009130478)
SIN = -3.6274606827646494e-05, .0024905067402869463, -.0807456523180008, .7853981852531433
COS = -.0003189094422850758, .015850016847252846, -.30842435359954834, 1.
LOG_SCALE = 1.6525916635146132e-07  # 2 ln 2 a binary exponent, which e counts in 2^23
MASK = 0xFFFFFFFF


def signed(word, bits):
    """The low bits of an integer in two's complement."""
    half = 1 << bits - 1
    return (word + half) % (2 * half) - half


def sizes(shape):
    """A shape as a tuple of ints. TypeError, ValueError."""
    try:
        found = tuple(map(index, shape)) if hasattr(shape, "__iter__") else (index(shape),)
    except TypeError:
        raise TypeError("shape must be whole numbers, samples first, "
                        f"got {shape!r}") from None
    if not found or min(found) < 0:
        raise ValueError("shape must begin with the samples and hold no negative size, "
                         f"got {found}")
    return found


def integer(name, given):
    """A number as an int. TypeError names what was given instead."""
    if type(given) is int:
        return given
    require_plain(name, given)
    try:
        return index(given)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {reprlib.repr(given)}") from None


def integers(name, given):
    """A number, or an integer a row as int64 (rows,), a new one: their low 64 bits.

    given: an integer, a list, a tuple, a range, an array or a tensor. TypeError.
    """
    require_plain(name, given)
    try:
        if isinstance(given, (list, tuple, range)):
            low_bits = [signed(index(v), 64) for v in given]
            return np.array(low_bits, np.int64)
        if not getattr(given, "ndim", 0):
            return signed(index(given), 64)
    except TypeError:
        pass
    dtype = getattr(given, "dtype", None)
    whole = "int" in getattr(dtype, "name", str(dtype))
    if not whole:
        raise TypeError(f"{name} must be an integer, or integers (batch,), "
                        f"got {dtype or reprlib.repr(given)}")
    if hasattr(given, "data_ptr"):
        return given.long().clone()
    return np.array(given, np.int64)


def are_numbers(seed, sample):
    """Whether one seed and one id name a whole call, and no array names its rows."""
    return isinstance(seed, int) and isinstance(sample, int)


def named(seed, sample):
    """(seed, sample) as `integers`. TypeError too for one id beside seeds a row."""
    seed = integers("seed", seed)
    sample = integers("sample", sample)
    if isinstance(sample, int) and sample and not isinstance(seed, int):
        raise TypeError(f"sample must have an id a row, as seed has one, got {sample}")
    return seed, sample


def keys(seed, sample, rows, xp=np, device="cpu"):
    """The seed and the id of each row, int64 (rows, 2), of which 64 and 32 bits count.

    Numbers: ids count from `sample` on. A seed a row, (rows,): ids are 0, or `sample`,
    which must then have one a row too. An id a row beside one seed: as given. ValueError
    for another shape, TypeError as in `named`.
    """
    seed, sample = named(seed, sample)
    table = xp.zeros((rows, 2), dtype=xp.int64, device=device)
    if are_numbers(seed, sample):
        sample = sample + xp.arange(rows, device=device)
    columns = {"seed": seed, "sample": sample}
    for k, (name, v) in enumerate(columns.items()):
        if not isinstance(v, int) and tuple(v.shape) != (rows,):
            raise ValueError(f"{name} has shape {tuple(v.shape)}, not {(rows,)}")
        if isinstance(v, np.ndarray) and xp is not np:
            v = xp.from_numpy(v)
        table[:, k] = v
    return table


def philox(counter, key):
    """Philox4x32-10: four words of a counter and a key, int64 that hold uint32.

    counter: four integers below 2^32, arrays or int64 tensors of them. key: two. A product
    may wrap; its low 64 bits are right. [Philox: Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"]
    """
    def in_int64(c):
        return c.astype(np.int64) if isinstance(c, np.ndarray) else c

    c0, c1, c2, c3 = map(in_int64, counter)
    k0, k1 = map(in_int64, key)
    for _ in range(10):
        p0 = c0 * MULTIPLIERS[0]
        p1 = c2 * MULTIPLIERS[1]
        c0 = (p1 >> 32 & MASK) ^ c1 ^ k0
        c1 = p1 & MASK
        c2 = (p0 >> 32 & MASK) ^ c3 ^ k1
        c3 = p0 & MASK
        k0 = k0 + WEYL[0] & MASK
        k1 = k1 + WEYL[1] & MASK
    return c0, c1, c2, c3


def words(shape, seed=0, sample=0, step=0, tag=PRIOR, *, xp=np, device="cpu"):
    """The words behind an array of `shape`, its first axis the samples.

    seed, sample: numbers, or arrays with an integer a row, as in `keys`. A number
    sample is the global id of the first row, so that a shard or a batch draws its own part.
    xp, device: torch for tensors there; step may then be a 0-d int64 tensor.
    Returns int64 (batch, quads, 4), quads = ceil(elements of a sample / 4).
    """
    shape = sizes(shape)
    size = int(np.prod(shape[1:]))
    if xp is np or not hasattr(step, "data_ptr"):
        step = integer("step", step)
    tag = integer("tag", tag)
    table = keys(seed, sample, shape[0], xp, device)
    seed, ids = table[:, :1], table[:, 1:]
    quads = xp.arange(-(-size // 4), dtype=xp.int64, device=device)
    counter = quads[None], ids & MASK, step & MASK, tag & MASK
    key = seed & MASK, seed >> 32 & MASK
    return xp.stack(philox(counter, key), -1)  # from the fourth round on of all counters


def elements(quads, shape):
    """Drop the unused end of each sample's last quad and restore the shape."""
    shape = sizes(shape)
    size = int(np.prod(shape[1:]))
    flat = quads.reshape(shape[0], 4 * quads.shape[1])
    return flat[:, :size].reshape(shape)


def cast(v, dtype):
    """An array or tensor in another dtype, on its own device.

    A Python number stays as it is: it takes its neighbour's dtype. torch.asarray would move
    a tensor to the default device that a user has set.
    """
    if isinstance(v, float):
        return v
    return v.astype(dtype, copy=False) if hasattr(v, "astype") else v.to(dtype)


def to_uniform(word, xp=np):
    """float32(word) * 2^-32 + 2^-33, in (0, 1]. xp: numpy, or torch for tensors."""
    return cast(word, xp.float32) * 2.**-32 + 2.**-33


def fma(x, y, z, xp=np):
    """float32 x*y + z rounded once, of float32 numbers.

    It computes in float64, where the product is exact. For every value that the noise
    takes, the two roundings, to float64 and to float32, give what one would:
    tests/mathematics/test_noise.py counts every case.
    """
    total = cast(x, xp.float64) * cast(y, xp.float64)
    total += z
    return cast(total, xp.float32)


def horner(coefficients, x, xp=np):
    """The polynomial in float32 by Horner's rule, one fma a power, the highest first."""
    x = cast(x, xp.float64)
    value = coefficients[0]
    for c in coefficients[1:]:
        value = fma(value, x, c, xp)
    return value


def radius(word, xp=np):
    """r = sqrt(-2 ln u), from u's binary exponent and a polynomial in its mantissa."""
    i = cast(word, xp.float32).view(xp.int32)
    m = (i & 0x7FFFFF) | 0x4F000000
    t = 2. - m.view(xp.float32) * 2.**-31
    e = xp.clip(m - i, 0, 1 << 28)
    mantissa = fma(t * t, horner(LOG, t, xp), t, xp)
    v = fma(LOG_SCALE, cast(e, xp.float32), mantissa, xp)
    # torch's own float32 root is not always the nearest; by float64 it is, on any machine
    return cast(xp.sqrt(cast(v, xp.float64)), xp.float32)


def cos_sin(word, xp=np):
    """cos and sin of an angle of at most an eighth of a turn; bit 30 exchanges them."""
    word = cast(word, xp.int32)
    g = ((word & 0x7FFFFE) | 0x40000001).view(xp.float32) - 3.
    y = g * g
    sin = horner(SIN, y, xp) * g
    cos = horner(COS, y, xp)
    exchanged = (word & 0x40000000) != 0
    return (xp.where(exchanged, sin, cos),
            xp.where(exchanged, cos, sin))


def to_normal(w, xp=np):
    """Four words (..., 4) to four standard normals: Box-Muller on (w0, w1) and (w2, w3)."""
    r = radius(w[..., ::2], xp)
    angle = cast(w[..., 1::2], xp.int32)
    r = xp.where(angle < 0, -r, r)  # bit 31
    cos, sin = cos_sin(angle, xp)
    return xp.stack((r * cos, r * sin), -1).reshape(w.shape)


def normal(shape, seed=0, sample=0, step=0, tag=PRIOR, *, xp=np, device="cpu"):
    """z ~ N(0, I), float32 of `shape`, its first axis the samples. |z| < 6.77.

    tag: what the draw is for, by default a prior. The others: as in `words`.

    Example:
        >>> z = normal((3, 2), seed=1)
        >>> print((normal((2, 2), seed=1, sample=1) == z[1:]).all())  # rows 1 and 2 alone
        True
    """
    drawn = words(shape, seed, sample, step, tag, xp=xp, device=device)
    return elements(to_normal(drawn, xp), shape)


def uniform(shape, seed=0, sample=0, step=0, tag=TIME):
    """u ~ U(0, 1], float32 of `shape`.

    tag: by default a time, so that it shares no word with `normal`. The others: as in
    `words`.
    """
    return elements(to_uniform(words(shape, seed, sample, step, tag)), shape)


def rademacher(shape, seed=0, sample=0, step=0, tag=PROBE):
    """-1 or +1 with equal odds, float32 of `shape`: -1 where the word's top bit is set.

    tag: by default a probe. The others: as in `words`.
    """
    top_bit = elements(words(shape, seed, sample, step, tag) >> 31, shape)
    return 1 - 2 * top_bit.astype(np.float32)

"""Noise as a pure function of (seed, sample, element, step, tag): the bit contract.

    key     = (seed mod 2^32, seed div 2^32)
    counter = (quad, sample, step, tag),  quad = j div 4, word = j mod 4
              for element j of a flattened sample; a quad never spans two samples
    words   = Philox4x32-10(counter, key)                                [Philox]
    uniform = float32(word) * 2^-32 + 2^-33, in (0, 1]
    normals: words (w0, w1) -> (r cos theta, r sin theta), (w2, w3) likewise,
              r = sqrt(-2 ln u(w_even)), theta = 2 pi w_odd / 2^32     [Box-Muller]

Every float operation below is a float32 product, sum or square root that IEEE 754 rounds
correctly, in the order written, with no contraction: any machine that keeps the order
returns the same bits. The polynomial constants belong to the contract.
"""

from operator import index

import numpy as np

# What a draw is for. Draws that differ in any of seed, sample, step or tag are independent.
(PRIOR, PERTURBATION, PREDICTOR, TIME, DATA, PROBE, DEQUANTIZATION, CHOICE, CHURN,
 ORDER) = range(10)
CORRECTOR = 16  # corrector k draws with tag CORRECTOR + k

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
# -2 ln(1 + t) = t*t*P(t) - 2t on [-1/3, 1/3]; highest power first
LOG = (-.280527225337371, .30777078035381056, -.2799161311212554, .32831921841281836,
       -.40022337369302013, .5001563777039499, -.666663962746524, .9999987215778645)
SIN = -.00019515283191224998, .008332160761852269, -.16666654609548479
COS = -.0013591853552147096, .04165577704174116, -.49999884745877027, 1.
LOG_SCALE = -2 * np.log(2.) * 2.**-23
ANGLE_SCALE = np.pi / 2 * 2.**-30


def philox(counter, key):
    """Philox4x32-10: four uint32 words of a counter, four, and a key, two uint32 arrays or ints,
    broadcast together. [Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"]
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint32) for c in counter))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        hi0, hi1 = (p0 >> 32).astype(np.uint32), (p1 >> 32).astype(np.uint32)
        c0, c1 = hi1 ^ c1 ^ np.uint32(k0), p1.astype(np.uint32)
        c2, c3 = hi0 ^ c3 ^ np.uint32(k1), p0.astype(np.uint32)
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def words(shape, seed=0, sample=0, step=0, tag=0):
    """The uint32 words behind an array of `shape`, its first axis the samples.

    sample: global id of the first sample, so that a shard or a batch draws its own part.
    Returns uint32 (batch, quads, 4), quads = ceil(elements of a sample / 4).
    """
    batch, size = shape[0], int(np.prod(shape[1:]))
    seed, sample, step, tag = map(index, (seed, sample, step, tag))
    ids = ((sample & 0xFFFFFFFF) + np.arange(batch, dtype=np.int64)) & 0xFFFFFFFF
    quads = np.arange(-(-size // 4), dtype=np.int64)
    counter = quads[None, :], ids[:, None], step & 0xFFFFFFFF, tag & 0xFFFFFFFF
    return np.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)), -1)


def _elements(quads, shape):
    """Drop the unused end of each sample's last quad and restore the shape."""
    size = int(np.prod(shape[1:]))
    return quads.reshape(shape[0], 4 * quads.shape[1])[:, :size].reshape(shape)


def to_uniform(word):
    """float32(word) * 2^-32 + 2^-33, in (0, 1]."""
    return word.astype(np.float32) * np.float32(2.**-32) + np.float32(2.**-33)


def horner(coefficients, x):
    """The float32 polynomial, a product and a sum a power, highest power first."""
    value = np.float32(coefficients[0])
    for c in coefficients[1:]:
        value = value * x + np.float32(c)
    return value


def radius(word):
    """r = sqrt(-2 ln u): the binary exponent apart, then a polynomial in t = m - 1."""
    i = np.minimum(to_uniform(word).view(np.int32), np.int32(0x3F7FFFFF))  # u < 1
    e = (i - np.int32(0x3F2AAAAB)) & np.int32(-0x800000)  # m in [2/3, 4/3)
    t = (i - e).view(np.float32) - np.float32(1)
    return np.sqrt(((t * t) * horner(LOG, t) - np.float32(2) * t)
                   + e.astype(np.float32) * np.float32(LOG_SCALE))


def cos_sin(word):
    """cos and sin of 2 pi word / 2^32; the quadrant is taken off the integer, exactly."""
    q = (word + np.uint32(1 << 29)) >> np.uint32(30)
    a = (word - (q << np.uint32(30))).view(np.int32).astype(np.float32) \
        * np.float32(ANGLE_SCALE)
    a2 = a * a
    sin, cos = ((horner(SIN, a2) * a2) * a) + a, horner(COS, a2)
    odd = (q & np.uint32(1)).astype(bool)
    cos, sin = np.where(odd, sin, cos), np.where(odd, cos, sin)
    return np.where((q == 1) | (q == 2), -cos, cos), np.where(q >= 2, -sin, sin)


def to_normal(w):
    """Four words (..., 4) to four standard normals: Box-Muller on (w0, w1) and (w2, w3)."""
    r = radius(w[..., ::2])
    cos, sin = cos_sin(w[..., 1::2])
    return np.stack((r * cos, r * sin), -1).reshape(w.shape)


def normal(shape, seed=0, sample=0, step=0, tag=0):
    """z ~ N(0, I), float32 of `shape`; the first axis is the samples. |z| < 6.77."""
    return _elements(to_normal(words(shape, seed, sample, step, tag)), shape)


def uniform(shape, seed=0, sample=0, step=0, tag=0):
    """u ~ U(0, 1], float32 of `shape`."""
    return _elements(to_uniform(words(shape, seed, sample, step, tag)), shape)


def rademacher(shape, seed=0, sample=0, step=0, tag=0):
    """-1 or +1 with equal odds, float32 of `shape`: the word's top bit set is -1."""
    sign = words(shape, seed, sample, step, tag) >> np.uint32(31)
    return _elements(np.float32(1) - np.float32(2) * sign.astype(np.float32), shape)

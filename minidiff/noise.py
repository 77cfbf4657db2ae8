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
LOG_SCALE = -2 * float(np.log(2.)) * 2.**-23
ANGLE_SCALE = np.pi / 2 * 2.**-30
MASK = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10: four words of a counter and a key, int64 that hold uint32.

    counter: four, key: two integers below 2^32, arrays or int64 tensors of them; a product may
    wrap, its low 64 bits are right. [Philox: Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3"]
    """
    c0, c1, c2, c3, k0, k1 = (c.astype(np.int64) if isinstance(c, np.ndarray) else c
                              for c in (*counter, *key))
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK
        c2, c3 = (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + WEYL[0] & MASK, k1 + WEYL[1] & MASK
    return c0, c1, c2, c3


def words(shape, seed=0, sample=0, step=0, tag=0):
    """The words behind an array of `shape`, its first axis the samples.

    sample: global id of the first sample, so that a shard or a batch draws its own part.
    Returns int64 (batch, quads, 4), quads = ceil(elements of a sample / 4).
    """
    batch, size = shape[0], int(np.prod(shape[1:]))
    seed, sample, step, tag = map(index, (seed, sample, step, tag))
    ids = (sample & MASK) + np.arange(batch, dtype=np.int64)[:, None] & MASK
    quads = np.arange(-(-size // 4), dtype=np.int64)[None, :]
    counter = *np.broadcast_arrays(quads, ids), step & MASK, tag & MASK
    return np.stack(philox(counter, (seed & MASK, seed >> 32 & MASK)), -1)


def elements(quads, shape):
    """Drop the unused end of each sample's last quad and restore the shape."""
    size = int(np.prod(shape[1:]))
    return quads.reshape(shape[0], 4 * quads.shape[1])[:, :size].reshape(shape)


def to_uniform(word, xp=np):
    """float32(word) * 2^-32 + 2^-33, in (0, 1]. xp: numpy, or torch for tensors."""
    return xp.asarray(word, dtype=xp.float32) * 2.**-32 + 2.**-33


def horner(coefficients, x):
    """The float32 polynomial, a product and a sum a power, highest power first."""
    value = coefficients[0]
    for c in coefficients[1:]:
        value = value * x + c
    return value


def radius(word, xp=np):
    """r = sqrt(-2 ln u): the binary exponent apart, then a polynomial in t = m - 1."""
    i = xp.clip(to_uniform(word, xp).view(xp.int32), None, 0x3F7FFFFF)  # u < 1
    e = (i - 0x3F2AAAAB) & -0x800000  # m in [2/3, 4/3)
    t = (i - e).view(xp.float32) - 1.
    v = ((t * t) * horner(LOG, t) - 2. * t) + xp.asarray(e, dtype=xp.float32) * LOG_SCALE
    # by float64, which changes no bit: torch's own float32 root is not always the nearest
    return xp.asarray(xp.sqrt(xp.asarray(v, dtype=xp.float64)), dtype=xp.float32)


def cos_sin(word, xp=np):
    """cos and sin of 2 pi word / 2^32; the quadrant is taken off the integer, exactly."""
    word = xp.asarray(word, dtype=xp.int64)
    q = word + (1 << 29) >> 30  # 4 is quadrant 0 again
    a = xp.asarray(word - (q << 30), dtype=xp.float32) * ANGLE_SCALE
    a2 = a * a
    sin, cos = ((horner(SIN, a2) * a2) * a) + a, horner(COS, a2)
    odd = q & 1 == 1
    cos, sin = xp.where(odd, sin, cos), xp.where(odd, cos, sin)
    return xp.where((q == 1) | (q == 2), -cos, cos), xp.where((q == 2) | (q == 3), -sin, sin)


def to_normal(w, xp=np):
    """Four words (..., 4) to four standard normals: Box-Muller on (w0, w1) and (w2, w3)."""
    r = radius(w[..., ::2], xp)
    cos, sin = cos_sin(w[..., 1::2], xp)
    return xp.stack((r * cos, r * sin), -1).reshape(w.shape)


def normal(shape, seed=0, sample=0, step=0, tag=0):
    """z ~ N(0, I), float32 of `shape`; the first axis is the samples. |z| < 6.77."""
    return elements(to_normal(words(shape, seed, sample, step, tag)), shape)


def uniform(shape, seed=0, sample=0, step=0, tag=0):
    """u ~ U(0, 1], float32 of `shape`."""
    return elements(to_uniform(words(shape, seed, sample, step, tag)), shape)


def rademacher(shape, seed=0, sample=0, step=0, tag=0):
    """-1 or +1 with equal odds, float32 of `shape`: the word's top bit set is -1."""
    return 1 - 2 * elements(words(shape, seed, sample, step, tag) >> 31, shape).astype(np.float32)

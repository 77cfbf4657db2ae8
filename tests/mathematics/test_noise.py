"""The noise contract: its words, its floats and its statistics."""

import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from minidiff import kernels, noise
from minidiff.kernels import on_host
from minidiff.kernels.check.words import ANSWERS, STAGES, every_word, philox, stages
from minidiff.machine import cores

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Philox inverted: counters whose words are the ends, quadrant edges and binade edges
# (seed, sample, step, tag, quad): words
EDGES = {
    (0xA86B57D606CDB662, 0x6D6A7BBE, 0x9E20313F, 0xD963ED1D, 54):
        (0x00000000, 0x00000000, 0xFFFFFFFF, 0xFFFFFFFF),
    (0x73C25633069871AE, 0x61DFA532, 0xB9BF953A, 0x5E24D3B8, 39):
        (0x00000001, 0x1FFFFFFF, 0xFFFFFFFE, 0x20000000),
    (0xF7C9C1C52B61C066, 0xFDD6A066, 0x27E0D6F7, 0x9FE15197, 1):
        (0x000000FF, 0x3FFFFFFF, 0x00000100, 0x40000000),
    (0xE9F27EB55479F6CD, 0x2E1614F8, 0x1F6E1AA6, 0x339D50E3, 55):
        (0x80000000, 0x5FFFFFFF, 0x7FFFFFFF, 0x60000000),
    (0x9B6A920888A226DF, 0x565A90C9, 0xAC754BA3, 0x82FE6B33, 46):
        (0xAAAAAAAA, 0x7FFFFFFF, 0xAAAAAAAB, 0x80000000),
    (0x833D9FC1A1396A44, 0xC588A829, 0x43A204EA, 0x5E2104D6, 44):
        (0x55555555, 0x9FFFFFFF, 0x55555556, 0xA0000000),
    (0x5DF488F91481B404, 0x48414E49, 0x5840534C, 0xBAEA9285, 5):
        (0xFFFFFEFF, 0xBFFFFFFF, 0xFFFFFF00, 0xC0000000),
    (0x9FD16312931957C4, 0x54D26807, 0xB9CECACC, 0xBA5A27B4, 50):
        (0xFFFFFF7F, 0xDFFFFFFF, 0xFFFFFF80, 0xE0000000),
    (0x370B4822DC810460, 0x8656DB5B, 0xB780DDE5, 0xBFA01054, 26):
        (0x00000000, 0x80000000, 0x00000000, 0x40000000),
    (0x74F2136B5A232E59, 0x904113C1, 0x17C61233, 0xFD051CAC, 16):
        (0x01000000, 0x00000001, 0x01000001, 0xFFFFFFFE),
}
ALPHA = 1e-6
Z = stats.norm.isf(ALPHA / 2)  # 4.89: a standard normal statistic stays within +-Z


def bits(a):
    return np.asarray(a).view(np.uint32)


def every_kind_of_word():
    """Random words, and 300 either side of each edge: ends, quadrants, binades, m = 2/3."""
    near = np.arange(-300, 301)
    edges = [k * 2**29 for k in range(8)] + [2**k for k in range(33)] \
        + [2**k * 2 // 3 for k in range(33)]
    random = np.random.default_rng(0).integers(0, 2**32, 1 << 20)
    return np.concatenate([*((e + near) % 2**32 for e in edges), random]).astype(np.uint32)


def ulps(got, exact):
    """The largest error in units of the exact value's last float32 place."""
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.max(np.abs(got - exact) / unit)


# ---- words ----

def test_random123_known_answers(place):
    """Of NumPy's and of each backend's."""
    for counter, key, words in ANSWERS:
        assert tuple(int(w) for w in noise.philox(counter, key)) == words
        assert tuple(philox(place[0], np.array([counter], np.uint32), key)[0].tolist()) == words


def test_words_of_65_536_random_counters(place):
    rng = np.random.default_rng(1)
    for _ in range(4):
        counters = rng.integers(0, 2**32, (1 << 14, 4), np.uint32)
        key = rng.integers(0, 2**32, 2).tolist()
        got = philox(place[0], counters, key)
        assert np.array_equal(got.T, noise.philox(counters.T, key))


if triton:
    @triton.jit
    def tl_philox(counters, out, seed, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        quad = tl.load(counters + 4 * at)
        sample = tl.load(counters + 4 * at + 1)
        step = tl.load(counters + 4 * at + 2)
        tag = tl.load(counters + 4 * at + 3)
        w0, w1, w2, w3 = tl.philox(seed, quad, sample, step, tag)
        tl.store(out + 4 * at, w0.to(tl.int32, bitcast=True))
        tl.store(out + 4 * at + 1, w1.to(tl.int32, bitcast=True))
        tl.store(out + 4 * at + 2, w2.to(tl.int32, bitcast=True))
        tl.store(out + 4 * at + 3, w3.to(tl.int32, bitcast=True))


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_words_are_tritons_own():
    """The contract's words are tl.philox(seed, quad, sample, step, tag)."""
    seed = 0x123456789ABCDEF
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counters = torch.from_numpy(np.random.default_rng(2).integers(
        -2**31, 2**31, (4096, 4), np.int32)).to(device)
    out = torch.empty_like(counters)
    tl_philox[16,](counters, out, seed, BLOCK=256)
    want = noise.philox(counters.cpu().numpy().view(np.uint32).T,
                        (seed & 0xFFFFFFFF, seed >> 32))
    assert np.array_equal(out.cpu().numpy().view(np.uint32).T, want)


def test_the_counter_is_quad_sample_step_tag_and_the_key_the_seed():
    got = noise.words((2, 7), seed=0x500000004, sample=3, step=2, tag=1)
    assert got.shape == (2, 2, 4)
    for row in range(2):
        for quad in range(2):
            want = noise.philox((quad, 3 + row, 2, 1), (4, 5))
            assert np.array_equal(got[row, quad], want)


def test_seed_sample_and_step_wrap():
    """Seeds are taken modulo 2^64 (so may be negative), samples and steps modulo 2^32."""
    z = noise.normal((5, 3), seed=2**64 - 7, sample=2**32 - 2, step=2**32 - 1)
    assert np.array_equal(z, noise.normal((5, 3), seed=-7, sample=2**40 - 2, step=2**40 - 1))
    assert np.array_equal(z[2:], noise.normal((3, 3), seed=-7, sample=0, step=2**32 - 1))
    assert not np.array_equal(noise.normal((5, 3), seed=1), noise.normal((5, 3), seed=1 + 2**32))
    counter = {"seed": 1, "sample": 2, "step": 3, "tag": 4}
    for kind in (np.int32, np.int64, np.uint32):
        z = noise.normal((5, 3), **{name: kind(v) for name, v in counter.items()})
        assert np.array_equal(z, noise.normal((5, 3), **counter))


def test_a_shard_is_a_slice_of_the_whole():
    whole = noise.normal((12, 3, 5), seed=5, step=2, tag=1)
    for a, b in ((0, 1), (3, 4), (4, 12)):
        shard = noise.normal((b - a, 3, 5), seed=5, sample=a, step=2, tag=1)
        assert np.array_equal(bits(shard), bits(whole[a:b]))


def test_a_quad_never_spans_two_samples():
    """A sample's noise is the start of the same sample's longer noise, whatever its size."""
    long = noise.normal((3, 12), seed=6)
    for size in range(13):
        assert np.array_equal(bits(noise.normal((3, size), seed=6)), bits(long[:, :size]))


def test_empty():
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 5)):
        for draw in (noise.normal, noise.uniform, noise.rademacher):
            assert draw(shape).shape == shape


# ---- floats ----

def test_golden_bits():
    z = noise.normal((2, 6), seed=2024, sample=7, step=3, tag=noise.CORRECTOR)
    assert [f"{b:08x}" for b in bits(z).flat] == [
        "bfdcbfba", "bf59205c", "3f675e7f", "3f13beab", "be915d57", "bf4fe86b",
        "3ff06d62", "bec5ad0f", "be9cfdf8", "3ef1ae3a", "bef423f3", "3f4a36e9"]


def test_constants_are_the_contract_s():
    """To the bit: a polynomial beside it would still be near a logarithm, a sine or a cosine."""
    def shown(constants):
        return " ".join(f"{b:08x}" for b in bits(np.array(constants, np.float32)))
    assert shown(noise.LOG) == \
        "3bb5102d bc51de17 3c9ab724 bbb94b96 3c87027d 3cf987e9 3daad1d4 3e7fff5f"
    assert shown(noise.SIN) == "b8182590 3b2337c5 bda55dfa 3f490fdb"
    assert shown(noise.COS) == "b9a7334d 3c81d7e5 be9de9cc 3f800000"
    assert shown([noise.LOG_SCALE]) == "34317218"
    for c in (*noise.LOG, *noise.SIN, *noise.COS, noise.LOG_SCALE):
        assert float(np.float32(c)) == c


def test_uniform_is_in_0_1():
    ends = noise.to_uniform(np.array([0, 2**32 - 1], np.uint32))
    assert ends.tolist() == [2.**-33, 1.]
    u = noise.uniform((256, 256), seed=3)
    words = noise.words((256, 256), seed=3, tag=noise.TIME).reshape(256, 256)
    # one rounding of the word to 24 bits, one of the sum
    assert np.abs(u - (words + .5) / 2**32).max() <= 2.**-24
    assert (u > 0).all() and (u <= 1).all()


def test_rademacher_is_the_top_bit():
    words = noise.words((64, 10), seed=4, tag=noise.PROBE).reshape(64, -1)[:, :10]
    assert np.array_equal(noise.rademacher((64, 10), seed=4), np.where(words < 2**31, 1, -1))


def exact_u(words):
    """u of even words, float64: w / 2^32 of what float32 holds, but 2^-33 and 1/2 at the ends."""
    u = words.astype(np.float32).astype(np.float64) / 2**32
    return np.where(u == 0, 2.**-33, np.where(u == 1, .5, u))


def exact_angle(words):
    """cos and sin of odd words, float64: of pi/4 g, g an odd multiple of 2^-22, or exchanged."""
    g = ((words & 0x7FFFFE) + 1.) * 2.**-22 - 1
    cos, sin = np.cos(np.pi / 4 * g), np.sin(np.pi / 4 * g)
    exchanged = (words >> 30 & 1) == 1
    return np.where(exchanged, sin, cos), np.where(exchanged, cos, sin)


@pytest.fixture(scope="module")
def exhausted():
    """Every float that an even word can become and every odd word's angle: `wrong`, how many of
    NumPy's stages are not those of C's fmaf; a digest of all their bits; the errors, in ulp, of
    `radius`, and of `cos` and `sin` before they are exchanged."""
    if reason := kernels.why_not("host"):
        pytest.skip(f"host: {reason}")
    words = every_word()
    found = SimpleNamespace(words=len(words), wrong=0, radius=0., cos=0., sin=0.)
    digest = hashlib.blake2b(digest_size=8)
    with pytest.MonkeyPatch.context() as patch:
        flags = *on_host.native(), "-DLIBM_FMA"
        patch.setattr(on_host, "native", lambda: flags)
        starts = range(0, len(words), 2**18)

        def part(start):
            """The stages of a part, how many of them C makes otherwise, and their errors."""
            w = words[start:start + 2**18]
            got = stages("numpy", w)
            wrong = int((bits(got) != bits(stages("host", w))).sum())
            exact = [np.sqrt(-2 * np.log(exact_u(w[:, 0])))]
            if start < 2**22:  # all angles; then come exchange and sign
                exact += exact_angle(w[:, 1])
            return got, wrong, [ulps(got[:, k], v) for k, v in enumerate(exact)]
        part(0)  # compiled by one thread
        with ThreadPoolExecutor(cores()) as pool:
            for got, wrong, errors in pool.map(part, starts):
                digest.update(got)
                found.wrong += wrong
                for name, error in zip(("radius", "cos", "sin"), errors):
                    setattr(found, name, max(getattr(found, name), error))
    found.digest = digest.hexdigest()
    return found


def test_numpys_fma_is_c_s_for_every_value_of_the_noise(exhausted):
    """No double rounding: 83,886,081 radii, 4,194,304 angles, each sign and exchange."""
    assert exhausted.wrong == 0 and exhausted.words == 83_886_081


def test_every_bit_of_the_stages_is_the_contract_s(exhausted):
    """Whatever changes one of 419,430,405 values changes this."""
    assert exhausted.digest == "ce010c357004bd1a"


def test_accuracies(exhausted):
    assert exhausted.radius < 1.10 and exhausted.cos < 1.30 and exhausted.sin < 1.57


def test_minus_two_ln_u_is_within_1_05_ulp(monkeypatch):
    words = every_kind_of_word()
    monkeypatch.setattr(np, "sqrt", lambda v: v)
    assert ulps(noise.radius(words), -2 * np.log(exact_u(words))) < 1.05


@pytest.mark.parametrize("flags", [("-march=x86-64",), ("-march=ivybridge",), ("-march=haswell",)],
                         ids=lambda flags: flags[0])
def test_a_cpu_of_another_age_returns_the_bits(monkeypatch, flags):
    """SSE2 and AVX have no fma: by float64 there. AVX2 has."""
    if reason := kernels.why_not("host"):
        pytest.skip(f"host: {reason}")
    info = Path("/proc/cpuinfo")
    needs = {"-march=ivybridge": "f16c", "-march=haswell": "fma"}.get(flags[0], "sse2")
    if not info.exists() or f" {needs} " not in info.read_text():
        pytest.skip("this CPU cannot run it")
    monkeypatch.setattr(on_host, "native", lambda: (*flags, "-fopenmp-simd"))
    words = every_kind_of_word()[:2**20].reshape(-1, 2)
    try:
        got = stages("host", words)
    except subprocess.CalledProcessError:
        pytest.skip("the compiler knows no such processor")
    assert on_host.has_fma() == (needs == "fma")
    assert np.array_equal(bits(got), bits(stages("numpy", words)))


def test_stages_on_backends(place):
    """Words, radius, cos, sin and normals: beside every edge, and at 86,000 words between."""
    words = every_kind_of_word()[:1 << 17]
    words = np.stack((words, np.random.default_rng(5).permutation(words)), -1)
    got, want = stages(place[0], words), stages("numpy", words)
    for name, a, b in zip(STAGES, got.T, want.T, strict=True):
        assert np.array_equal(bits(a.copy()), bits(b.copy())), name


def test_odd_moments_vanish_exactly():
    """To flip bit 31 of the odd word negates both normals, to flip bit 30 exchanges them."""
    w = np.random.default_rng(6).permutation(every_kind_of_word())
    w = w[:len(w) // 4 * 4].reshape(-1, 4).astype(np.int64)
    z = noise.to_normal(w)
    odd = np.array([0, 1, 0, 1])
    assert np.array_equal(bits(noise.to_normal(w ^ odd << 31)), bits(-z))
    exchanged = z.reshape(-1, 2, 2)[..., ::-1].reshape(-1, 4)
    assert np.array_equal(bits(noise.to_normal(w ^ odd << 30)), bits(exchanged.copy()))


def test_normals_are_box_muller_of_their_words():
    """z0, z1 from w0, w1 and z2, z3 from w2, w3, against float64.

    A product of r (1.10 ulp) and cos or sin (1.57 ulp), rounded (half an ulp): 3.17 ulp, each at
    most 2^-23 of the value, and less than 1e-5 of that for the errors' product.
    """
    w = np.random.default_rng(3).permutation(every_kind_of_word())
    w = w[:len(w) // 4 * 4].reshape(-1, 4)
    sign = np.where(w[:, 1::2] >> 31 == 1, -1, 1)
    r, (cos, sin) = sign * np.sqrt(-2 * np.log(exact_u(w[:, ::2]))), exact_angle(w[:, 1::2])
    z = np.stack([r * cos, r * sin], -1).reshape(-1, 4)
    assert (np.abs(noise.to_normal(w) - z) <= 3.2 * 2.**-23 * np.abs(z)).all()


def test_normals_reach_6_76_and_are_never_0():
    largest = float(noise.radius(np.array([0]))[0])
    assert abs(largest - 6.7637) < 1e-4  # sqrt(-2 ln 2^-33)
    r = noise.radius(every_kind_of_word())
    assert r.max() == largest and r.min() == noise.radius(np.array([2**32 - 256]))[0] > 3e-4
    ends = noise.radius(np.array([2**32 - 128, 2**32 - 1]))  # float32 rounds them to 2^32
    assert np.allclose(ends, (2 * np.log(2))**.5, rtol=2.**-23)
    every_angle = np.arange(2**22, dtype=np.uint32) << 1  # neither exchanged nor negated
    cos, sin = noise.cos_sin(every_angle)
    assert np.abs(cos).min() > 1e-7 and np.abs(sin).min() > 1e-7


def test_normals_of_edge_words_on_backends(place):
    """Extreme words, quadrant edges and binade edges, reached by their counters."""
    backend, device = place
    for (seed, sample, step, tag, quad), words in EDGES.items():
        counter = {"seed": seed, "sample": sample, "step": step, "tag": tag}
        assert tuple(noise.words((1, 256), **counter)[0, quad].tolist()) == words
        got = kernels.normal((1, 256), device=device, backend=backend, **counter).cpu()
        assert np.array_equal(bits(got), bits(noise.normal((1, 256), **counter)))


def test_normals_of_random_counters_on_backends(place):
    """2^14 counters for each of four draws of seed, sample, step and tag."""
    backend, device = place
    rng = np.random.default_rng(4)
    for _ in range(4):
        seed, (sample, step) = int(rng.integers(-2**63, 2**63)), rng.integers(0, 2**32, 2).tolist()
        counter = {"seed": seed, "sample": sample, "step": step, "tag": int(rng.integers(32))}
        got = kernels.normal((128, 512), device=device, backend=backend, **counter).cpu()
        assert np.array_equal(bits(got), bits(noise.normal((128, 512), **counter)))


# ---- statistics: fixed seeds, alpha 1e-6 a statistic ----

@pytest.fixture(scope="module")
def many():
    """2^22 normals."""
    return noise.normal((1024, 4096), seed=10).ravel()


def test_moments(many):
    """Mean, variance, skewness, kurtosis: under N(0, 1) the Hermite polynomial He_n has mean 0
    and variance n!, so its average over N = 2^22 is N(0, n! / N)."""
    z = many.astype(np.float64)
    for hermite, variance in ((z, 1), (z**2 - 1, 2), (z**3 - 3 * z, 6),
                              (z**4 - 6 * z**2 + 3, 24)):
        assert abs(hermite.mean()) < Z * (variance / z.size)**.5


def test_distribution():
    """Kolmogorov-Smirnov, and chi-square over 256 bins of equal probability, both ways."""
    z = noise.normal((1024, 1024), seed=11).ravel()
    assert stats.kstest(z, "norm").pvalue > ALPHA
    for cdf in (stats.norm.cdf(z), noise.uniform((1024, 1024), seed=11).ravel()):
        counts = np.bincount((np.minimum(cdf, 1 - 2.**-24) * 256).astype(int), minlength=256)
        assert ALPHA / 2 < stats.chisquare(counts).pvalue < 1 - ALPHA / 2
    assert abs(noise.rademacher((1024, 1024), seed=11).sum()) < Z * 1024


def test_tails(many):
    """The numbers beyond 3, 4 and 5 sigma are binomial, either side."""
    for sigma in (3, 4, 5):
        for count in ((many > sigma).sum(), (many < -sigma).sum()):
            assert stats.binomtest(int(count), many.size, stats.norm.sf(sigma)).pvalue > ALPHA


def test_streams_are_independent():
    """Correlation, of values and of squares, of N independent pairs has standard error
    1 / sqrt N: along a sample, across samples, steps, tags, seeds, and with two swapped."""
    n = 1024
    z = noise.normal((n, n), seed=13)
    flat = z.ravel()
    others = [(flat[:-lag], flat[lag:]) for lag in (1, 2, 3, 4, 5)] + [(z[:-1], z[1:])] + [
        (z, noise.normal((n, n), **{"seed": 13} | change)) for change in (
            {"step": 1}, {"tag": 1}, {"seed": 14}, {"seed": 13 + 2**32}, {"sample": n})]
    others += [(z[:-1], z.T[1:]), (noise.normal((n, n), seed=13, step=1, tag=2),
                          noise.normal((n, n), seed=13, step=2, tag=1))]
    for k, (a, b) in enumerate(others):
        a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
        for f in (lambda v: v, lambda v: (v**2 - 1) / 2**.5):
            assert abs((f(a) * f(b)).mean()) < Z / a.size**.5, k

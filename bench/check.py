"""Every op on every backend against NumPy, bit for bit.

A row: op, backend, dtype, shape, max_ulp, passed, reason. `passed` is None where the backend
cannot run here; it never counts as passed.
"""

import inspect

import numpy as np

from .. import noise
from ..kernels import BACKENDS, FLOATS, OPS, dsm_loss, missing, noise_norms, norms, update
from .stages import STAGES, philox, stages

SHAPES = [(0, 3), (4, 0), (1,), *((3, d) for d in range(1, 10)), (7, 13), (2, 3, 5, 7), (1, 4099),
          (300, 2), (17, 1024)]
LARGE = (2**32 + 5, 1), (2**29 + 3, 5), (3, 2**30 + 8), (1, 2**31 + 8)  # many rows, few, one
CLIP = -1., 1.
SUMS = "norms", "noise_norms", "dsm_loss"
ANSWERS = (  # Random123's known answers: counter, key, words
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)))
COUNTER = {"seed": 0x123456789ABCDEF, "sample": 5, "step": 3, "tag": 2}


def ulps(got, expected):
    """Distance in units in the last place of two NumPy arrays, element by element.

    Any NaN equals any NaN; -0 is one away from +0. Bits of a 16-bit float come as int16.
    """
    nan = np.isnan(got) & np.isnan(expected) if got.dtype.kind == "f" else False
    bits = np.dtype(f"i{got.itemsize}")

    def ordered(a):
        i = a.view(bits).astype(np.int64)
        return np.where(i < 0, -(i & np.iinfo(bits).max) - 1, i)
    return np.where(nan, 0, np.abs(ordered(got) - ordered(expected)))


def _numpy(tensor):
    """A tensor's values, or for bfloat16 its bits with every NaN made one."""
    import torch
    if tensor.dtype == torch.bfloat16:
        nan = tensor.isnan()
        return torch.where(nan, torch.tensor(0x7FC0, dtype=torch.int16),
                           tensor.view(torch.int16)).numpy()
    return tensor.numpy()


def compare(op, name, dtype, shape, got, expected, variant="", allowed=0):
    """Compare two CPU tensors to `allowed` ulp; the reason names the worst element."""
    shown = {"op": op, "backend": name, "dtype": dtype, "shape": list(shape)}
    if tuple(got.shape) != tuple(expected.shape) or got.dtype != expected.dtype:
        return shown | {"max_ulp": None, "passed": False, "reason":
                        f"returned {got.dtype} {tuple(got.shape)}, not {expected.dtype} "
                        f"{tuple(expected.shape)}"}
    d = ulps(_numpy(got.contiguous()), _numpy(expected))
    if not d.size or d.max() <= allowed:
        return shown | {"max_ulp": int(d.max(initial=0)), "passed": True, "reason": variant}
    at = tuple(int(i) for i in np.unravel_index(d.argmax(), d.shape))
    a, b = float(got[at]), float(expected[at])
    return shown | {"max_ulp": int(d.max()), "passed": False, "reason":
                    f"{variant}: {int((d > 0).sum())} of {d.size} elements differ, most at {at}: "
                    f"got {a:.9g}, expected {b:.9g} (off by {a - b:.3g}, {int(d.max())} ulp)"}


def cases(op, dtypes, shapes, seed=0):
    """dtype, shape, operands, parameters, coef, result rounded from the float32 oracle."""
    import torch
    rng = np.random.default_rng(seed)
    for dtype in dtypes:
        for shape in shapes:
            for variant in ("per call", "per sample"):
                u = [torch.from_numpy(rng.standard_normal(shape, np.float32))
                     .to(getattr(torch, dtype)) for _ in op.operands]
                p = op.parameters(rng, shape[0] if variant == "per sample" else None)
                coef = op.coefficients(CLIP if op.denoise else None, **p)
                if variant == "per sample":
                    coef = np.broadcast_to(coef, (shape[0], coef.shape[-1]))
                out = torch.empty(shape)
                update([v.float() for v in u], coef, out=out, backend="numpy", **COUNTER)
                yield dtype, shape, variant, u, p, coef, out.to(getattr(torch, dtype))


def _device(name):
    import torch
    return "cuda" if name in ("triton", "cupy") and torch.cuda.is_available() else "cpu"


def check_op(op, name, dtypes=FLOATS, shapes=SHAPES, seed=0):
    """Rows of one op on one backend: per call and per sample, out of place and in place."""
    import torch
    for dtype, shape, variant, u, _, coef, expected in cases(op, dtypes, shapes, seed):
        u = [v.to(_device(name)) for v in u]
        out = torch.full(shape, float("nan"), dtype=expected.dtype, device=_device(name))
        update(u, coef, out=out, backend=name, **COUNTER)
        yield compare(op.name, name, dtype, shape, out.cpu(), expected, f"{variant}, out of place")
        if u:
            update(u, coef, out=u[0], backend=name, **COUNTER)
            yield compare(op.name, name, dtype, shape, u[0].cpu(), expected, f"{variant}, in place")


def sums_of(op, s, coef, name):
    """One of SUMS on a backend, as a tuple: the loss comes with its gradient."""
    if op == "norms":
        return norms(s, backend=name),
    if op == "noise_norms":
        return noise_norms(s, backend=name, **COUNTER),
    return dsm_loss(s, coef, backend=name, **COUNTER)


def sum_cases(dtypes, shapes):
    """dtype, shape, s, coef of dsm_loss."""
    import torch
    rng = np.random.default_rng(3)
    for dtype in dtypes:
        for shape in shapes:
            s = torch.from_numpy(rng.standard_normal(shape, np.float32)).to(getattr(torch, dtype))
            yield dtype, shape, s, rng.uniform(.1, 2., (shape[0], 3))


def sum_rows(op, name, dtype, shape, want, got):
    """Rows of one of SUMS: sums within 1 ulp of NumPy's, the gradient by ==."""
    parts = zip(got, want, ("sum", "gradient")[:len(want)], (1, 0), strict=False)
    return [compare(op, name, dtype, shape, a.cpu(), b, part, ulp) for a, b, part, ulp in parts]


def check_sums(name, ops=SUMS, dtypes=FLOATS, shapes=SHAPES):
    """Rows of norms, noise_norms and dsm_loss on one backend."""
    for dtype, _, s, coef in sum_cases(dtypes, shapes):
        for op in ops:
            yield from sum_rows(op, name, dtype, s.shape, sums_of(op, s, coef, "numpy"),
                                sums_of(op, s.to(_device(name)), coef, name))


def normals_at(rows, quads, seed, sample=0, tag=0):
    """z of these quads of these rows, (rows, 4 quads) float32."""
    rows = np.asarray(rows)[:, None] + sample & noise.MASK
    w = noise.philox((np.asarray(quads), rows, 0, tag), (seed & noise.MASK, seed >> 32))
    return noise.to_normal(np.stack(w, -1)).reshape(len(rows), -1)


def last_normals(out, seed, sample):
    """The end of out's last rows, and the float32 normals that belong there, as tensors, both
    of `kernels.normal`."""
    import torch
    batch, size = out.shape
    rows = range(batch - min(batch, 3 if size < 8 else 1), batch)
    quads = range(max(0, (size - 5) // 4), (size + 3) // 4)  # the last two, or the only
    want = normals_at(rows, quads, seed, sample)[:, :size - 4 * quads[0]]
    return out[rows[0]:, 4 * quads[0]:], torch.from_numpy(want)


def check_words(name, n=100_000):
    """The noise's stages on a backend, n random ones against NumPy's: Philox, with its known
    answers, then the words' radii, cosines, sines and normals, bit for bit."""
    rng, key = np.random.default_rng(1), (0x9ABCDEF0, 0x12345678)
    counters = rng.integers(0, 2**32, (n, 4), np.uint32)
    good = all((philox(name, np.array([c], np.uint32), k)[0] == w).all()
               for c, k, w in ANSWERS)
    same = (philox(name, counters, key) == philox("numpy", counters, key)).all()
    yield {"op": "philox", "backend": name, "dtype": "uint32", "shape": list(counters.shape),
           "max_ulp": None, "passed": bool(good and same), "reason":
           "Random123's answers and random counters" if good and same else
           "Random123's answers differ" if not good else "random counters differ from NumPy's"}
    words = counters[:, :2]
    distance = ulps(stages(name, words), stages("numpy", words)).max(0)
    wrong = [f"{stage} by {d} ulp" for stage, d in zip(STAGES, distance) if d]
    yield {"op": "stages", "backend": name, "dtype": "float32", "shape": list(words.shape),
           "max_ulp": int(distance.max()), "passed": not wrong, "reason":
           f"off NumPy's: {', '.join(wrong)}" if wrong else "radius, cos, sin and two normals"}


def check_equation(op, trials=100, shape=(64, 5)):
    """A row's step against its own coefficients, and the float32 update against both.

    In float64 step(u, z) = sum c_k u_k to 1e-12 of the terms and step(0) = 0. The float32
    update of n terms rounds each coefficient, product and sum once, so it lies within
    gamma_{n+1} sum |c_k u_k|, gamma_m = m e / (1 - m e), e = 2^-24, of the float64 step.
    """
    rng = np.random.default_rng(2)
    worst, bound, zero = 0., 0., 0.
    for _ in range(trials):
        p = op.parameters(rng)
        c = op.coefficients(**p)  # of the step alone: a denoise stage is another row's
        c = c[:-4] if op.denoise else c
        u = [rng.standard_normal(shape, np.float32) for _ in op.operands]
        own = {n: v for n, v in p.items() if n in inspect.signature(op.step).parameters}
        terms = [*u, noise.normal(shape, **COUNTER)] if op.noise else u
        exact = op.step(*(t.astype(np.float64) for t in terms), **own)
        scale = sum(abs(c_k * t) for c_k, t in zip(c, terms))
        total = sum(c_k * t.astype(np.float64) for c_k, t in zip(c, terms))
        worst = max(worst, (abs(exact - total) / np.maximum(scale, 1)).max())
        zero = max(zero, np.abs(op.step(*(0. * t for t in terms), **own)).max())
        m = (len(c) + 1) * 2.**-24
        out = update(u, c, out=np.empty(shape, np.float32), backend="numpy", **COUNTER)
        bound = max(bound, (abs(out - exact) / (m / (1 - m) * scale + 1e-44)).max())
    passed = worst <= 1e-12 and zero == 0 and bound <= 1
    yield {"op": op.name, "backend": "equation", "dtype": "float64", "shape": list(shape),
           "max_ulp": None, "passed": bool(passed), "reason":
           f"|step - sum c u| {worst:.1e} (1e-12), step(0) {zero:g} (0), "
           f"float32 error / bound {bound:.2f} (1)"}


def check(ops=None, backends=None, dtypes=FLOATS, seed=0):
    """All rows, one by one, for names of ops and backends (default: all)."""
    sums = [name for name in SUMS if not ops or name in ops]
    ops = [OPS[name] for name in ops or OPS if name in OPS]
    for op in ops:
        yield from check_equation(op)
    for name in backends or BACKENDS:
        reason = missing(name)
        if reason and backends:
            raise RuntimeError(f"backend {name!r}: {reason}")
        if reason:
            yield from ({"op": op, "backend": name, "dtype": dtype, "shape": None,
                         "max_ulp": None, "passed": None, "reason": reason}
                        for op in [*(op.name for op in ops), *sums] for dtype in dtypes)
            continue
        yield from check_words(name)
        for op in ops:
            yield from check_op(op, name, dtypes, seed=seed)
        if sums:
            yield from check_sums(name, sums, dtypes)


def report(rows):
    """Print failures as they come, then a line an op and backend; returns the rows."""
    groups, kept = {}, []
    for row in rows:
        kept.append(row)
        if row["passed"] is False:
            print(f"FAILED {row['op']} {row['backend']} {row['dtype']} {row['shape']}: "
                  f"{row['reason']}")
        groups.setdefault((row["backend"], row["op"]), []).append(row)
    for (name, op), group in groups.items():
        ran = [r for r in group if r["passed"] is not None]
        ulp = max((r["max_ulp"] for r in ran if r["max_ulp"] is not None), default=None)
        print(f"{name:<10}{op:<20}{sum(r['passed'] for r in ran):>5} of {len(ran):>4} passed  "
              + (f"{ulp} ulp" if ulp is not None else group[-1]["reason"]) if ran else
              f"{name:<10}{op:<20}not run: {group[0]['reason']}")
    failed = sum(r["passed"] is False for r in kept)
    print(f"{sum(r['passed'] is True for r in kept)} passed, {failed} failed, "
          f"{sum(r['passed'] is None for r in kept)} not run")
    return kept

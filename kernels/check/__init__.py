"""Every op on every backend against NumPy, bit for bit.

A row: op, backend, dtype, shape, max_ulp, passed, reason. `passed` is None where the
backend cannot run here; it never counts as passed.
"""

from functools import partial

import numpy as np
import torch

from ... import noise
from ...affine import accepted_by
from .. import BACKENDS, FLOATS, OPS, dsm_loss, missing, noise_norms, norms, update
from .compare import compare, oracle, row_of
from .words import check_words

SHAPES = [(0, 3), (4, 0), (1,), *((3, d) for d in range(1, 10)), (7, 13), (2, 3, 5, 7), (1, 4099),
          (300, 2), (17, 1024)]
CLIP = -1., 1.
SUMS = "norms", "noise_norms", "dsm_loss"
COUNTER = {"seed": 0x123456789ABCDEF, "sample": 5, "step": 3, "tag": 2}


def cases(op, dtypes, shapes, seed=0):
    """dtype, shape, operands, parameters, coef, result rounded from the float32 oracle."""
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
                like = torch.empty(shape, dtype=getattr(torch, dtype))
                yield dtype, shape, variant, u, p, coef, oracle(u, coef, like, **COUNTER)


def device_of(name):
    """Where a backend is checked."""
    return "cuda" if name in ("triton", "cupy") and torch.cuda.is_available() else "cpu"


def check_op(op, name, dtypes=FLOATS, shapes=SHAPES, seed=0):
    """Rows of one op on one backend: per call and per sample, out of place and in place."""
    for dtype, shape, variant, u, _, coef, expected in cases(op, dtypes, shapes, seed):
        u = [v.to(device_of(name)) for v in u]
        outs = {"out of place": torch.full_like(expected, torch.nan, device=device_of(name))}
        if u:
            outs["in place"] = u[0]
        for where, out in outs.items():
            update(u, coef, out=out, backend=name, **COUNTER)
            yield compare(op.name, name, dtype, shape, out.cpu(), expected, f"{variant}, {where}")


def sums_of(op, s, coef, name, **counter):
    """One of SUMS on a backend, as a tuple: the loss comes with its gradient."""
    if op == "norms":
        return norms(s, backend=name),
    if op == "noise_norms":
        return noise_norms(s, backend=name, **counter),
    return dsm_loss(s, coef, backend=name, **counter)


def sum_cases(dtypes, shapes):
    """dtype, shape, s, coef of dsm_loss."""
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
            yield from sum_rows(op, name, dtype, s.shape, sums_of(op, s, coef, "numpy", **COUNTER),
                                sums_of(op, s.to(device_of(name)), coef, name, **COUNTER))


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
        step = partial(op.step, **accepted_by(op.step, p))
        terms = [*u, noise.normal(shape, **COUNTER)] if op.noise else u
        exact = step(*(t.astype(np.float64) for t in terms))
        scale = sum(abs(c_k * t) for c_k, t in zip(c, terms))
        total = sum(c_k * t.astype(np.float64) for c_k, t in zip(c, terms))
        worst = max(worst, (abs(exact - total) / np.maximum(scale, 1)).max())
        zero = max(zero, np.abs(step(*(0. * t for t in terms))).max())
        m = (len(c) + 1) * 2.**-24
        out = update(u, c, out=np.empty(shape, np.float32), backend="numpy", **COUNTER)
        bound = max(bound, (abs(out - exact) / (m / (1 - m) * scale + 1e-44)).max())
    passed = worst <= 1e-12 and zero == 0 and bound <= 1
    yield row_of(op.name, "equation", "float64", shape, bool(passed),
                 f"|step - sum c u| {worst:.1e} (1e-12), step(0) {zero:g} (0), "
                 f"float32 error / bound {bound:.2f} (1)")


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
            for op in [*(op.name for op in ops), *sums]:
                for dtype in dtypes:
                    yield row_of(op, name, dtype, None, None, reason)
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
        passed = [r["passed"] for r in group if r["passed"] is not None]
        found = [r["max_ulp"] for r in group if r["max_ulp"] is not None]
        if not passed:
            print(f"{name:<10}{op:<20}not run: {group[0]['reason']}")
            continue
        worst = f"{max(found)} ulp" if found else group[-1]["reason"]
        print(f"{name:<10}{op:<20}{sum(passed):>5} of {len(passed):>4} passed  {worst}")
    verdicts = [r["passed"] for r in kept]
    print(f"{verdicts.count(True)} passed, {verdicts.count(False)} failed, "
          f"{verdicts.count(None)} not run")
    return kept

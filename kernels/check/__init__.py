"""Every op on every backend against NumPy, bit for bit.

`check` makes the rows, in this order:

    equation    each op's step against its own coefficients and its float32 update
    words       on each backend: the noise stage by stage, in words.py
    updates     every op in all dtypes and shapes, with one row of coefficients for the
                call and one for each sample, and where it draws with a seed and an id for
                each, out of place and in place
    sums        norms, noise_norms and dsm_loss

compare.py says what is equal. yours.py holds a file of your own kernels to the same cases.

A row: op, backend, dtype, shape, max_ulp, passed, reason. `passed` is None where the
backend cannot run here; it never counts as passed.
"""

from collections import Counter
from functools import partial
from itertools import product

import numpy as np
import torch

from ... import noise
from ...affine import accepted_by
from .. import BACKENDS, FLOATS, OPS, update, why_not
from .cases import COUNTER, SUMS, sum_cases, sums_of, update_cases
from .compare import row_of
from .explain import compared
from .words import check_words

# ---- the rows ----

def check(ops=None, backends=None, dtypes=FLOATS, seed=0, shapes=None):
    """All rows, one by one, for names of ops and backends (default: all).

    RuntimeError for a backend that is asked for and cannot run here.
    """
    names = ops or [*OPS, *SUMS]
    ops = [OPS[name] for name in names if name in OPS]
    sums = [name for name in SUMS if name in names]
    for op in ops:
        yield from check_equation(op)
    for backend in backends or BACKENDS:
        reason = why_not(backend)
        if reason and backends:
            raise RuntimeError(f"backend {backend!r}: {reason}")
        if reason:
            names = [*(op.name for op in ops), *sums]
            for name, dtype in product(names, dtypes):
                yield row_of(name, backend, dtype, None, None, reason)
            continue
        yield from check_words(backend)
        for op in ops:
            yield from check_op(op, backend, dtypes, shapes, seed)
        yield from check_sums(backend, sums, dtypes, shapes, seed)


def check_equation(op, trials=100, shape=(64, 5)):
    """A row's step against its own coefficients, and the float32 update against both.

    The worst of some trials of `equation_errors` must lie within 1e-12, 0 and 1.
    """
    rng = np.random.default_rng(2)
    errors = [equation_errors(op, rng, shape) for _ in range(trials)]
    worst, zero, rounding = np.max(errors, 0)
    passed = worst <= 1e-12 and zero == 0 and rounding <= 1
    yield row_of(op.name, "equation", "float64", shape, bool(passed),
                 f"|step - sum c u| {worst:.1e} (1e-12), step(0) {zero:g} (0), "
                 f"float32 error / bound {rounding:.2f} (1)")


def equation_errors(op, rng, shape):
    """One trial's |step - sum c u| over its terms, |step(0)| and float32 error over bound.

    In float64 step(u, z) = sum c_k u_k to 1e-12 of the terms and step(0) = 0. The float32
    update of n terms rounds each coefficient, product and sum once, so it lies within
    gamma_{n+1} sum |c_k u_k|, gamma_m = m e / (1 - m e), e = 2^-24, of the float64 step.
    """
    parameters = op.parameters(rng)
    step = partial(op.step, **accepted_by(op.step, parameters))
    coef = op.coefficients(**parameters)
    if op.denoise:
        coef = coef[:-4]  # of the step alone: a denoise stage is another row's
    u = [rng.standard_normal(shape, np.float32) for _ in op.operands]
    z = [noise.normal(shape, **COUNTER)] if op.noise else []
    terms = [t.astype(np.float64) for t in (*u, *z)]

    exact = step(*terms)
    products = [c_k * t for c_k, t in zip(coef, terms)]
    total = sum(products)
    scale = sum(abs(c_u) for c_u in products)
    step_error = abs(exact - total) / np.maximum(scale, 1)

    at_zero = step(*(0. * t for t in terms))

    out = np.empty(shape, np.float32)
    update(u, coef, out=out, backend="numpy", **COUNTER)
    m_e = (len(coef) + 1) * 2.**-24
    gamma = m_e / (1 - m_e)
    update_error = abs(out - exact) / (gamma * scale + 1e-44)
    return step_error.max(), abs(at_zero).max(), update_error.max()


def check_op(op, backend, dtypes=FLOATS, shapes=None, seed=0, hard=()):
    """Rows of one op on one backend, out of place and in place; shapes, hard: of
    `cases.update_cases`."""
    device = device_of(backend)
    for case in update_cases(op, dtypes, shapes, seed, hard):
        if case.z is not None:  # ours draw it
            continue
        u = [v.to(device) for v in case.u]
        fresh = torch.full_like(case.expected[0], torch.nan, device=device)
        outs = {"out of place": fresh}
        if u:
            outs["in place"] = u[0]
        for where, out in outs.items():
            update(u, case.coef, out=out, backend=backend, **case.counter)
            yield from compared(case, backend, [out], where=f", {where}", draws=op.noise)


def check_sums(backend, ops=SUMS, dtypes=FLOATS, shapes=None, seed=0, hard=()):
    """Rows of norms, noise_norms and dsm_loss on one backend."""
    for name in ops:
        for case in sum_cases(name, dtypes, shapes, seed, hard):
            s = case.u[0].to(device_of(backend))
            got = sums_of(name, s, case.coef, backend, **case.counter)
            yield from compared(case, backend, got, draws=True)


def device_of(backend):
    """Where a backend is checked."""
    on_gpu = backend in ("triton", "cupy") and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


# ---- the report ----

def report(rows):
    """Print a failure of each kind as it comes, then a line an op and backend; returns the
    rows."""
    kept = []
    groups = {}
    shown = Counter()
    for row in rows:
        kept.append(row)
        name = row["op"], row["backend"]
        groups.setdefault(name, []).append(row)
        what = None if row["max_ulp"] else row["reason"].split(": ")[-1]
        kind = *name, row["explained"] or what
        shown[kind] += row["passed"] is False
        if row["passed"] is False and shown[kind] == 1:
            print(failure(row))
    wide = max([10, *(len(backend) + 1 for _, backend in groups)])
    for (op, backend), group in groups.items():
        print(f"{backend:<{wide}}{op:<20}{summary(group)}")
    verdicts = [row["passed"] for row in kept]
    print(f"{verdicts.count(True)} passed, {verdicts.count(False)} failed, "
          f"{verdicts.count(None)} not run")
    return kept


def failure(row):
    """A failed row in words."""
    because = row["explained"] and f"\n  {row['explained']}"
    return (f"FAILED {row['op']} {row['backend']} {row['dtype']} {row['shape']}: "
            f"{row['reason']}{because or ''}")


def summary(rows):
    """How many rows of one op and backend passed and how far they are off, in words."""
    passed = [row["passed"] for row in rows if row["passed"] is not None]
    if not passed:
        return f"not run: {rows[0]['reason']}"
    found = [row["max_ulp"] for row in rows if row["max_ulp"] is not None]
    worst = f"{max(found)} ulp" if found else rows[-1]["reason"]
    if found and all(passed) and rows[0]["within"]:
        worst = f"{rows[0]['within']}: at most {worst}"
    more = len(rows) - len(passed)
    not_run = f", {more} not run" if more else ""
    return f"{sum(passed):>5} of {len(passed):>4} passed{not_run}  {worst}"

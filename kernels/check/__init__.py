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

from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from ... import noise
from ...affine import accepted_by
from .. import BACKENDS, FLOATS, OPS, dsm_loss, noise_norms, norms, update, why_not
from .compare import compare, oracle, row_of
from .words import check_words

SHAPES = [
    (0, 3),  # no sample
    (4, 0),  # samples without elements
    (1,),
    *((3, size) for size in range(1, 10)),  # every remainder of a quad
    (7, 13),
    (2, 3, 5, 7),
    (1, 4099),
    (300, 2),
    (17, 1024),
]
CLIP = -1., 1.
SUMS = "norms", "noise_norms", "dsm_loss"
COUNTER = {"seed": 0x123456789ABCDEF, "sample": 5, "step": 3, "tag": 2}
KEYED = "a seed a row"


# ---- the rows ----

def check(ops=None, backends=None, dtypes=FLOATS, seed=0):
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
            yield from check_op(op, backend, dtypes, seed=seed)
        yield from check_sums(backend, sums, dtypes)


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


def check_op(op, backend, dtypes=FLOATS, shapes=SHAPES, seed=0):
    """Rows of one op on one backend, out of place and in place."""
    device = device_of(backend)
    for case in update_cases(op, dtypes, shapes, seed):
        u = [v.to(device) for v in case.u]
        fresh = torch.full_like(case.expected[0], torch.nan, device=device)
        outs = {"out of place": fresh}
        if u:
            outs["in place"] = u[0]
        for where, out in outs.items():
            update(u, case.coef, out=out, backend=backend, **case.counter)
            yield from case.rows(backend, [out], f", {where}")


def check_sums(backend, ops=SUMS, dtypes=FLOATS, shapes=SHAPES):
    """Rows of norms, noise_norms and dsm_loss on one backend."""
    for case in sum_cases(ops, dtypes, shapes):
        s = case.u[0].to(device_of(backend))
        got = sums_of(case.op, s, case.coef, backend, **case.counter)
        yield from case.rows(backend, got)


def device_of(backend):
    """Where a backend is checked."""
    on_gpu = backend in ("triton", "cupy") and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


# ---- the cases ----

class Case(NamedTuple):
    """One call of an op, on the CPU, and what NumPy makes of it.

    u: the operands. counter: seed, sample, step, tag. expected: NumPy's results, a tuple of
    tensors. parts: the names of the results, for the rows. allowed: how many ulp each may
    be off.
    """

    op: str
    dtype: str
    shape: tuple
    u: list
    coef: np.ndarray
    parameters: dict
    counter: dict
    expected: tuple
    parts: tuple
    allowed: tuple

    def rows(self, backend, got, where=""):
        """A row for each result that a backend got. where: added to the row's reason."""
        results = zip(got, self.expected, self.parts, self.allowed)
        for result, expected, part, ulp in results:
            result = result.cpu()
            yield compare(self.op, backend, self.dtype, self.shape, result, expected,
                          part=part + where, allowed=ulp)


def update_cases(op, dtypes, shapes, seed=0):
    """Cases of an op with random parameters, for the call and for each sample, and where it
    draws with KEYED's counters.

    NumPy's result is the float32 oracle's, rounded to the dtype.
    """
    rngs = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    variants = ["per call", "per sample"] + [KEYED] * op.noise
    for dtype, shape, variant in product(dtypes, shapes, variants):
        rng = rngs[variant == KEYED]  # of its own: the other cases stay as they were
        batch = shape[0] if variant == "per sample" else None
        u = [random_tensor(rng, shape, dtype) for _ in op.operands]
        parameters = op.parameters(rng, batch)
        coef = op.coefficients(CLIP if op.denoise else None, **parameters)
        if variant == "per sample":
            width = coef.shape[-1]
            coef = np.broadcast_to(coef, (batch, width))
        like = torch.empty(shape, dtype=getattr(torch, dtype))
        counter = a_row_each(rng, shape[0]) if variant == KEYED else COUNTER
        expected = oracle(u, coef, like, **counter)
        yield Case(op.name, dtype, shape, u, coef, parameters, counter,
                   expected=(expected,), parts=(variant,), allowed=(0,))


def a_row_each(rng, batch):
    """COUNTER with a random seed and id for each row."""
    return COUNTER | {"seed": rng.integers(-2**63, 2**63, batch),
                      "sample": rng.integers(0, 2**32, batch)}


def sum_cases(ops, dtypes, shapes):
    """Cases of those of SUMS that are named: u is (s,), coef is dsm_loss's.

    Sums may be 1 ulp off NumPy's; the gradient may not.
    """
    rng, other = np.random.default_rng(3), np.random.default_rng(4)
    for dtype, shape in product(dtypes, shapes):
        s = random_tensor(rng, shape, dtype)
        batch = shape[0]
        coef = rng.uniform(.1, 2., (batch, 3))
        keyed = a_row_each(other, batch)
        for op, counter in product(ops, (COUNTER, keyed)):
            if op == "norms" and counter is keyed:
                continue
            more = f", {KEYED}" * (counter is keyed)
            expected = sums_of(op, s, coef, "numpy", **counter)
            yield Case(op, dtype, shape, [s], coef, {}, counter, expected=expected,
                       parts=(f"sum{more}", f"gradient{more}"),  # a loss has both
                       allowed=(1, 0))


def random_tensor(rng, shape, dtype):
    """Standard normal numbers, drawn in float32, as a CPU tensor of a dtype."""
    values = rng.standard_normal(shape, np.float32)
    return torch.from_numpy(values).to(getattr(torch, dtype))


def sums_of(op, s, coef, backend, **counter):
    """One of SUMS on a backend, as a tuple: the loss comes with its gradient."""
    if op == "norms":
        return (norms(s, backend=backend),)
    if op == "noise_norms":
        return (noise_norms(s, backend=backend, **counter),)
    return dsm_loss(s, coef, backend=backend, **counter)


# ---- the report ----

def report(rows):
    """Print failures as they come, then a line an op and backend; returns the rows."""
    kept = []
    groups = {}
    for row in rows:
        kept.append(row)
        if row["passed"] is False:
            print(f"FAILED {row['op']} {row['backend']} {row['dtype']} {row['shape']}: "
                  f"{row['reason']}")
        group = groups.setdefault((row["backend"], row["op"]), [])
        group.append(row)
    for (backend, op), group in groups.items():
        print(f"{backend:<10}{op:<20}{summary(group)}")
    verdicts = [row["passed"] for row in kept]
    print(f"{verdicts.count(True)} passed, {verdicts.count(False)} failed, "
          f"{verdicts.count(None)} not run")
    return kept


def summary(rows):
    """How many rows of one op and backend passed and how far they are off, in words."""
    passed = [row["passed"] for row in rows if row["passed"] is not None]
    if not passed:
        return f"not run: {rows[0]['reason']}"
    found = [row["max_ulp"] for row in rows if row["max_ulp"] is not None]
    worst = f"{max(found)} ulp" if found else rows[-1]["reason"]
    return f"{sum(passed):>5} of {len(passed):>4} passed  {worst}"

"""One update as a peer is given it."""

from dataclasses import dataclass

import torch

from ...kernels import Op
from ...kernels.check.compare import CHUNK, in_parts


@dataclass(frozen=True)
class Work:
    """One update: c, the noise's coefficient last if there is any; clip: p0, p1, lo, hi of
    a denoise stage or None; u: the operands; out: a buffer of their shape."""

    op: Op
    c: list
    clip: list | None
    u: list
    out: torch.Tensor

    @property
    def noise(self):
        """Whether it draws."""
        return len(self.c) > len(self.u)

    @property
    def bytes(self):
        """What a fused update reads and writes."""
        return self.out.nbytes * (len(self.u) + 1)


def _term(c, value):
    return value if c == 1 else f"{c} * {value}"


def formula(w, clipped="({} * u0 + {} * u1).clip({}, {})", term=_term):
    """(names of the operands and z, the sum as one would write it, its coefficients
    constants)."""
    names = [*(f"u{k}" for k in range(len(w.u))), "z"]
    values = [*names]
    if w.clip:
        values[1] = clipped.format(*w.clip)
    return names, " + ".join(map(term, w.c, values))


def expression(w):
    """f(u0, u1, ..., z): the sum."""
    names, total = formula(w)
    return eval(f"lambda {', '.join(names)}: {total}")


def is_sum(result, v, coef, error, least=0.):
    """Whether a result is coef's sum of v, operands and z, as `update` says, whole.

    It may be off by `error` of its terms' magnitudes, a coefficient counted as `least` at
    least.
    """
    n = len(v)

    def good(rows):
        terms = [t[rows].double() for t in v]
        if coef[n:]:
            p0, p1, low, high = coef[n:]
            terms[1] = (p0 * terms[0] + p1 * terms[1]).clamp(low, high)
        total = sum(c * t for c, t in zip(coef, terms))
        size = sum(max(abs(c), least) * t.abs() for c, t in zip(coef, terms))
        return bool(((result[rows].double() - total).abs() <= error * size).all())
    chunk = CHUNK << 4 * result.is_cuda
    return all(in_parts(good, len(result), result[:1].numel(), chunk))

"""One update as a peer is given it."""

from dataclasses import dataclass

import torch

from ...kernels import Op


@dataclass(frozen=True)
class Work:
    """One update: c, the noise's coefficient last if there is any; clip: p0, p1, lo, hi of a
    denoise stage or None; u: the operands; out: a buffer of their shape."""

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

    @property
    def scaled(self):
        """How many terms have a coefficient to multiply by."""
        return sum(c_k != 1 for c_k in self.c)


def expression(w):
    """f(u0, u1, ..., z): the sum as one would write it, its coefficients as constants."""
    names = [f"u{i}" for i in range(len(w.u))]
    terms = [*names]
    if w.clip is not None:
        p0, p1, low, high = w.clip
        terms[1] = f"({p0} * u0 + {p1} * u1).clip({low}, {high})"
    terms = [v if c == 1 else f"{c} * {v}" for c, v in zip(w.c, [*terms, "z"])]
    return eval(f"lambda {', '.join([*names, 'z'])}: {' + '.join(terms)}")

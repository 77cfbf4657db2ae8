"""The cases of check: calls of an op, and what NumPy makes of them.

Each has parameters, operands and a counter of its own, drawn from check's seed. A counter's
fields are 0, small, or where a kernel may lose a bit: seeds from 2^63 on, ids that wrap at
2^32 within a batch, steps from 2^31 on.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch

from ... import noise
from .. import OPS, dsm_loss, noise_norms, norms
from .compare import expected_update, oracle

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
BEYOND = [  # the largest grid's side, the largest block, more than is checked elsewhere
    (70_001, 3),
    (1, 2**17 + 3),
    *[(1025, 1024)] * 2,  # twice: what is kept from the first is not the second
]
HARD = (64, 37)  # the shape of operands that hold special values
CLIP = -1., 1.
SUMS = "norms", "noise_norms", "dsm_loss"
COUNTER = {"seed": 0x123456789ABCDEF, "sample": 5, "step": 3, "tag": 2}
KEYED = "a seed a row"


@dataclass(frozen=True)
class Case:
    """One call of an op, on the CPU.

    u: the operands. coef, and the parameters that it follows from; they are None where it
    follows from none. counter: seed, sample, step, tag. note: what is tried, for the rows.
    z: what takes the noise's place, for a function that is given it; else None.
    """

    op: str
    dtype: str
    shape: tuple
    u: list
    coef: np.ndarray
    parameters: dict | None
    counter: dict
    note: str
    z: torch.Tensor | None = None

    @cached_property
    def expected(self):
        """NumPy's results, a tuple of tensors."""
        if self.op in SUMS:
            return sums_of(self.op, self.u[0], self.coef, "numpy", **self.counter)
        return (self.exact.to(getattr(torch, self.dtype)),)

    @cached_property
    def exact(self):
        """NumPy's update in float32, before it is rounded to the dtype."""
        like = torch.empty(self.shape)
        if self.keyed or self.z is not None:
            return oracle(self.terms, self.coef, like, **self.counter)
        return expected_update(OPS[self.op], self.u, self.coef, like, **self.counter)

    @property
    def terms(self):
        """The operands, and z where it takes the noise's place."""
        return self.u if self.z is None else [*self.u, self.z]

    @property
    def parts(self):
        """What each result is, for the rows."""
        if self.op not in SUMS:
            return (self.note,)
        names = ("value", "gradient") if self.op == "dsm_loss" else ("sum",)
        return tuple(f"{name}{self.note}" for name in names)

    @property
    def allowed(self):
        """How many ulp each result may be off: a sum 1, all else none."""
        return (1, 0) if self.op in SUMS else (0,)

    @property
    def keyed(self):
        """Whether each row has a seed and an id of its own."""
        return not noise.are_numbers(self.counter["seed"], self.counter["sample"])


# ---- of updates ----

def update_cases(op, dtypes, shapes=None, seed=0, hard=()):
    """Cases of an op: with parameters for the call and for each sample, where it draws with
    a seed a row; and of `hard` shapes, HARD if no shapes are named, numbers that kernels
    get wrong.
    """
    rng = np.random.default_rng([*op.name.encode(), seed % 2**64])
    variants = ["per call", "per sample"] + [KEYED] * op.noise
    for dtype, shape, variant in product(dtypes, shapes or SHAPES, variants):
        yield plain_case(op, dtype, shape, variant, rng)
    for dtype, shape in product(dtypes, [HARD] if shapes is None else hard):
        yield from hard_cases(op, dtype, shape, rng)


def plain_case(op, dtype, shape, variant, rng):
    """Standard normal operands; parameters for the call, or for each sample."""
    batch = shape[0]
    u = [random_tensor(rng, shape, dtype) for _ in op.operands]
    parameters = op.parameters(rng, batch if variant == "per sample" else None)
    clip = None
    if op.denoise:
        clip = -rng.uniform(.5, 1.5), rng.uniform(.5, 1.5)
    coef = op.coefficients(clip, **parameters)
    if variant == "per sample":
        coef = np.broadcast_to(coef, (batch, coef.shape[-1]))
    counter = fresh_counter(rng, batch, variant == KEYED)
    return Case(op.name, dtype, shape, u, coef, parameters, counter, variant)


def hard_cases(op, dtype, shape, rng):
    """Special values among operands; beside coefficients 0 and -0; coefficients that are no
    step's, where a step has a 1; subnormal results."""
    count = len(op.operands) + op.noise
    bounds = []
    if op.denoise:
        bounds = [*rng.uniform(-1, 1, 2), 0., 1.]
    usual = plain_case(op, dtype, shape, "per call", rng)
    zero = np.zeros(count)
    zero[-1] = 1.
    zero[0] *= -1
    coefs = {
        "special values": usual.coef,
        "special values, zero coefficients": [*zero, *bounds],
        "any coefficients": [*rng.uniform(-2, 2, count), *bounds],
        "subnormal results": [*(2.**-128 * rng.uniform(.5, 2., count)), *bounds],
    }
    for note, coef in coefs.items():
        special = "special" in note
        draw = special_tensor if special else random_tensor
        u = [draw(rng, shape, dtype) for _ in op.operands]
        parameters = usual.parameters if coef is usual.coef else None
        coef = np.asarray(coef)
        for given in range(op.noise + 1):
            counter = fresh_counter(rng, shape[0])
            z = draw(rng, shape, "float32") if given else None
            if u or given:
                yield Case(op.name, dtype, shape, u, coef, parameters, counter, note, z)
    if dtype != "float32" and len(op.operands) > 1:
        yield tie_case(op, dtype, shape, rng)


def tie_case(op, dtype, shape, rng):
    """Results half-way between two numbers of 16 bits: u0 + eps / 2, 1 <= |u0| < 2."""
    kind = getattr(torch, dtype)
    eps = torch.finfo(kind).eps
    u0 = 1 + eps * rng.integers(0, round(1 / eps), shape)
    u0 *= rng.choice([-1., 1.], shape)
    u = [torch.from_numpy(u0).to(kind)]
    u += [torch.ones(shape, dtype=kind) for _ in op.operands[1:]]
    coef = np.zeros(len(u) + op.noise)
    coef[:2] = 1., eps / 2
    if op.denoise:
        coef = np.append(coef, [0., 1., 0., 1.])  # u1 itself
    counter = fresh_counter(rng, shape[0])
    return Case(op.name, dtype, shape, u, coef, None, counter, "ties")


# ---- of sums ----

def sum_cases(op, dtypes, shapes=None, seed=0, hard=()):
    """Cases of one of SUMS: u is (s,), coef is dsm_loss's."""
    rng = np.random.default_rng([*op.encode(), seed % 2**64])
    keyed = [False] if op == "norms" else [False, True]
    for dtype, shape, by_row in product(dtypes, shapes or SHAPES, keyed):
        s = random_tensor(rng, shape, dtype)
        yield sum_case(op, dtype, s, rng, by_row, f", {KEYED}" * by_row)
    if op != "noise_norms":
        for dtype, shape in product(dtypes, [HARD] if shapes is None else hard):
            s = random_tensor(rng, shape, dtype)
            column = s.view(-1)[::2 * max(1, s[:1].numel())]  # of every other row
            column[:] = special_tensor(rng, column.shape, dtype)
            yield sum_case(op, dtype, s, rng, False, ", special values")


def sum_case(op, dtype, s, rng, by_row, note):
    """A sum over s, with random coefficients and a fresh counter."""
    batch = len(s)
    coef = rng.uniform(.1, 2., (batch, 3))
    counter = fresh_counter(rng, batch, by_row)
    return Case(op, dtype, tuple(s.shape), [s], coef, {}, counter, note)


def sums_of(op, s, coef, backend, **counter):
    """One of SUMS on a backend, as a tuple: the loss comes with its gradient."""
    if op == "norms":
        return (norms(s, backend=backend),)
    if op == "noise_norms":
        return (noise_norms(s, backend=backend, **counter),)
    return dsm_loss(s, coef, backend=backend, **counter)


def cases_of(op, dtypes, shapes=None, seed=0, hard=()):
    """Cases of an op or of one of SUMS, by its name."""
    if op in SUMS:
        return sum_cases(op, dtypes, shapes, seed, hard)
    return update_cases(OPS[op], dtypes, shapes, seed, hard)


# ---- what they are made of ----

def fresh_counter(rng, batch, by_row=False):
    """A counter whose fields are each 0, small or far out; or, by_row, with a random seed
    and id for each row."""
    def one_of(low, high):
        far = int(rng.integers(low, high, dtype=np.uint64))
        small = int(rng.integers(1, 100))
        return [0, small, far, far][rng.integers(4)]
    counter = {"seed": one_of(2**63, 2**64),
               "sample": one_of(2**32 - batch - 1, 2**32),
               "step": one_of(2**31, 2**32),
               "tag": one_of(2**31, 2**32)}
    if by_row:
        counter["seed"] = rng.integers(-2**63, 2**63, batch)
        counter["sample"] = rng.integers(0, 2**32, batch)
    return counter


def random_tensor(rng, shape, dtype):
    """Standard normal numbers, drawn in float32, as a CPU tensor of a dtype."""
    values = rng.standard_normal(shape, np.float32)
    return torch.from_numpy(values).to(getattr(torch, dtype))


def special_tensor(rng, shape, dtype):
    """The same, half of them replaced: NaN, infinities, both zeros, subnormal numbers, the
    largest and the smallest."""
    kind = getattr(torch, dtype)
    limits = torch.finfo(kind)
    least = limits.tiny * limits.eps
    positive = [np.inf, 0., least, limits.tiny / 2, limits.tiny, limits.max]
    negative = [-v for v in positive]
    values = torch.tensor([np.nan, *positive, *negative], dtype=kind)
    places = rng.integers(0, len(values), shape)
    chosen = values[torch.from_numpy(places)]
    kept = torch.from_numpy(rng.random(shape) < .5)
    return torch.where(kept, random_tensor(rng, shape, dtype), chosen)

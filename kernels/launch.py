"""The one object that every backend is handed: an update, its arguments checked."""

from functools import cache
from typing import Any, NamedTuple

from ..noise import MASK, are_numbers, integer, keys, named

SEEDS = 2**64 - 1


class NotCompiled(RuntimeError):
    """A kernel could not be compiled or loaded, and why, in one line."""


@cache
def dtype_name(dtype):
    """float32, bfloat16 ...: what NumPy and torch call it."""
    return str(dtype).removeprefix("torch.")


class Result:
    """What a launch leaves of e = ((c0*u0 + c1*u1) + ...) + cz*z; a sum is a sample's."""

    STATE = 0     # e, in out
    SQUARES = 1   # its sum of squares, returned; out is not written
    GRADIENT = 2  # the loss's gradient ((2*w)*e)*c0 in out, and the squares
    BOTH = 3      # e in out, and the squares
    TERMS = 4     # the squares of c0*u0, and those of cz*z; out is not written


class Keys(NamedTuple):
    """A seed and an id a row: int64 (batch, 2), where the rows are."""

    table: Any


def keys_of(seed, sample, like):
    """(seed, sample, Keys) of rows as many as like's; the Keys are None of two numbers.

    Keys in the seed's place are those of a call before.
    """
    if are_numbers(seed, sample):
        return seed, sample, None
    import torch
    batch = like.shape[0]
    if isinstance(seed, Keys):
        if len(seed.table) != batch:
            raise ValueError(f"seed and sample have {len(seed.table)} rows, not {batch}")
        return 0, 0, seed
    seed, sample = named(seed, sample)
    if are_numbers(seed, sample):
        return seed, sample, None
    return 0, 0, Keys(keys(seed, sample, batch, torch, like.device))


class Launch(NamedTuple):
    """An update as backends take it.

    A backend runs it by `update(launch, step)`; one that can look at it once has
    `prepare(launch)` instead, which returns run(step). The step is an int, or a 0-d int64
    tensor on the device. Either returns the sums of squares, float64 of shape `sums()`,
    until the next run writes there; or None.

    out: (batch, size), dense, where to write; it may be an operand.
    operands: up to four tensors like out.
    coef: float32 (rows, width) on their device. A row holds c0, c1, ..., one for each
      operand; cz where it draws; p0, p1, lo, hi where it clips; w where the result is a
      gradient.
    rows: what the rows are. "all": there is one. "sample": one a sample. "step": a table,
      of which the step chooses one, held to the first and the last.
    draws: whether noise is added. clips: whether u1 first becomes min(max(p0*u0 + p1*u1,
    lo), hi). result: one of Result. seed, sample, tag: the noise's counter, beside the
    step; unsigned. keys: None, or in place of seed and sample int64 (batch, 2), the two of
    each row, of which the low 64 and 32 bits count. first_step: what is added to a tensor
    step's value for the noise, and not for the row of coef.
    """

    out: Any
    operands: list
    coef: Any
    rows: str
    draws: bool
    clips: bool
    result: int
    seed: int
    sample: int
    tag: int
    first_step: int = 0
    keys: Any = None

    def variant(self):
        """What a kernel is compiled for: dtype, operands, draws, clips, result, keys."""
        return (dtype_name(self.out.dtype), len(self.operands), self.draws, self.clips,
                self.result, self.keys is not None)

    def counter(self, step):
        """seed, sample, step and tag of minidiff.noise, at a step."""
        seed, sample = self.seed, self.sample
        if self.keys is not None:
            seed, sample = self.keys.unbind(1)
        if not isinstance(step, int):
            step = step + self.first_step
        return seed, sample, step, self.tag

    def writes(self):
        """Whether out is written."""
        return self.result not in (Result.SQUARES, Result.TERMS)

    def sums(self):
        """The shape of the sums of squares, or None where the result has none."""
        batch = self.out.shape[0]
        if self.result == Result.TERMS:
            return batch, 2
        return (batch,) if self.result else None

    def aligned(self):
        """Whether every row of every array starts and ends at a multiple of 16 bytes."""
        row_bytes = self.out.shape[1] * self.out.element_size()
        starts = [u.data_ptr() for u in (self.out, *self.operands)]
        return not any(n % 16 for n in (row_bytes, *starts))

    def row(self, step):
        """Which row of coef a step chooses, a number."""
        return max(0, min(step, len(self.coef) - 1))


def launched(prepare, out, operands, rows, counter, result=Result.STATE):
    """run(step) of a Launch, as a backend prepares it: prepare(launch).

    out, operands: tensors (batch, ...). rows: the coefficients, `arguments.Rows`. counter:
    seed, sample, tag, first_step; the seed may be Keys.
    """
    seed, sample, tag, first_step = counter
    seed, sample, by_row = keys_of(seed, sample, out)
    tag = integer("tag", tag)
    if out.dim() != 2 and out.numel():
        out = out.view(len(out), -1)
        operands = [u.view(len(out), -1) for u in operands]
    table = by_row.table if by_row and rows.draws else None
    launch = Launch(out, operands, *rows, result, seed & SEEDS, sample & MASK, tag & MASK,
                    first_step & MASK, table)
    if not out.numel():  # nothing is launched, whatever its axes are
        nothing = out.new_zeros(launch.sums()).double() if result else None
        return lambda step: nothing
    return prepare(launch)
